"""Devices, dtypes and autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from open_mythos.checks import pick
from open_mythos.errors import ConfigError, EnvironmentError_

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str = "auto") -> torch.device:
    """``"auto"`` is CUDA where there is one, else the CPU; any other name is taken as it is.

    Raises:
        ConfigError: The name is not a device name.
        EnvironmentError_: A CUDA device was asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            "not a device name", where="device", value=name, allowed="auto, cpu, cuda, cuda:N, mps"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EnvironmentError_(
            "a CUDA device was asked for and PyTorch sees none",
            where="device",
            value=name,
            fix="use --device cpu, or install a CUDA build of PyTorch",
        )
    return device


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of ``x``, which lies on the host, that the host does not wait for."""
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def in_dry_run(x: torch.Tensor) -> bool:
    """Return whether ``x`` is a fake tensor of a dry run (:mod:`open_mythos.plan`)."""
    return hasattr(getattr(x, "fake_mode", None), "kernels")


def kernel_device(x: torch.Tensor) -> str:
    """Return the device type whose kernels serve ``x``.

    It is that of ``x`` itself, except in a dry run, whose tensors follow the code path of the
    device that they stand for.
    """
    kernels: str = getattr(getattr(x, "fake_mode", None), "kernels", x.device.type)
    return kernels


def training_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a training run's products on ``device``; "auto" is what its hardware is fast in.

    GPUs before compute capability 8 have no bfloat16 units: there it is float16.
    """
    if name != "auto":
        return resolve_dtype(name)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def resolve_dtype(name: str) -> torch.dtype:
    """The ``torch.dtype`` named "float32", "bfloat16" or "float16"."""
    return pick(DTYPES, name, "dtype")


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Mixed precision at ``dtype``; nothing at all for float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def as_autocast(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` in the dtype of the enclosing autocast region; itself outside of one."""
    if not torch.is_autocast_enabled(weight.device.type):
        return weight
    return weight.to(torch.get_autocast_dtype(weight.device.type))


class HostCopy:
    """A copy of ``x`` in host memory that does not make the host wait until it is read.

    On CUDA the copy is queued behind the work that computes ``x``, and :meth:`read` waits for that
    copy alone: work that was queued after it goes on meanwhile.
    """

    def __init__(self, x: torch.Tensor) -> None:
        self._host, self._copied = x.detach(), None
        if x.device.type == "cuda":
            pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._host = pinned.copy_(self._host, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> torch.Tensor:
        """Return the copy, once it has arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host
