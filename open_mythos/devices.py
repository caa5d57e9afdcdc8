"""Devices, dtypes and autocast."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch._compile import _disable_dynamo
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from open_mythos.checks import pick
from open_mythos.errors import ConfigError, EnvironmentError_

Function = TypeVar("Function", bound=Callable[..., Any])

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device called ``name``; "auto" is CUDA if available, else the CPU.

    Raises:
        ConfigError: The name is not a device name.
        EnvironmentError_: The name is that of a CUDA device and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            "not a device name", where="device", value=name, allowed="auto, cpu, cuda, cuda:N, mps"
        ) from error
    if device.type not in ("cpu", "cuda", "meta"):
        found = torch.accelerator.current_accelerator()
        if found is None or found.type != device.type:
            raise EnvironmentError_(
                f"PyTorch finds no device of the kind {device.type}", where="device", value=name,
                allowed="auto, cpu" + (f", {found.type}" if found else ""),
                fix="use --device cpu",
            )  # fmt: skip
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count() > 0:
        raise EnvironmentError_(
            "there is no such CUDA device", where="device", value=name,
            allowed=f"cuda:0 .. cuda:{torch.cuda.device_count() - 1}", fix="name another one",
        )  # fmt: skip
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EnvironmentError_(
            "PyTorch finds no CUDA device", where="device", value=name, allowed="cpu",
            fix="use --device cpu, or install a CUDA build of PyTorch",
        )  # fmt: skip
    return device


def free_memory(device: torch.device) -> int:
    """Return the bytes that a device can give now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    if info.is_file():  # "free" memory leaves out what only keeps files that were read
        values = dict(line.split(":", 1) for line in info.read_text().splitlines())
        return int(values["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def uncompiled(function: Function) -> Function:
    """Decorate as ``torch.compiler.disable`` does, which would import the compiler at once.

    That takes as long as importing torch, and most processes never compile.
    """
    decorated: Any = _disable_dynamo(function)
    return decorated


def constant_if_compiled(function: Function) -> Function:
    """Decorate as ``torch.compiler.assume_constant_result`` does; see :func:`uncompiled`."""
    marked: Any = function
    marked._dynamo_marked_constant = True
    return function


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy the CPU tensor ``x`` to ``device`` without a host-device sync."""
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def in_dry_run(x: torch.Tensor) -> bool:
    """Return whether ``x`` is a fake tensor of a dry run (:mod:`open_mythos.plan`)."""
    return hasattr(getattr(x, "fake_mode", None), "kernels")


def is_readable(x: torch.Tensor) -> bool:
    """Return whether reading values of ``x`` is possible and does not wait for a device.

    It is not in a trace, an export or a transform, on fake tensors and on the meta device.
    """
    return (
        x.device.type == "cpu"
        and not isinstance(x, FakeTensor)
        and not torch.compiler.is_compiling()
        and not is_transformed()
    )


def is_abstract(x: torch.Tensor) -> bool:
    """Return whether ``x`` has a shape and no values, outside of a dry run."""
    return x.is_meta or (isinstance(x, FakeTensor) and not in_dry_run(x))


def is_transformed() -> bool:
    """Return whether a transform of ``torch.func`` or forward-mode differentiation is at work.

    They need plain operations: the custom autograd functions have no rules for them.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def kernel_device(x: torch.Tensor) -> str:
    """Return the device type of ``x``; in a dry run, that of the target device."""
    kernels: str = getattr(getattr(x, "fake_mode", None), "kernels", x.device.type)
    return kernels


def training_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the matmul dtype of a training run on ``device``.

    "auto" is float32 on the CPU, bfloat16 on GPUs of compute capability 8 and above (older ones
    have no bfloat16 units), float16 on older ones.
    """
    if name != "auto":
        return resolve_dtype(name)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def resolve_dtype(name: str) -> torch.dtype:
    """Return the ``torch.dtype`` named "float32", "bfloat16" or "float16"."""
    return pick(DTYPES, name, "dtype")


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Return an autocast context of ``dtype``; a null context for float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` in float32, or as it is if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def as_autocast(weight: torch.Tensor) -> torch.Tensor:
    """Cast ``weight`` to the dtype of the enclosing autocast region, if any."""
    dtype = autocast_dtype(weight.device)
    return weight if dtype is None else weight.to(dtype)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of the enclosing autocast region; None outside and on the meta device."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Return a context without autocast."""
    on_meta = device.type == "meta"  # for which PyTorch has none
    return nullcontext() if on_meta else torch.autocast(device.type, enabled=False)


class HostCopy:
    """Asynchronous copy of ``x`` in host memory.

    On CUDA the copy is enqueued on the current stream, and :meth:`read` synchronizes on the copy
    alone, not on work enqueued after it.
    """

    def __init__(self, x: torch.Tensor) -> None:
        self._host, self._copied = x.detach(), None
        if x.device.type == "cuda":
            pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._host = pinned.copy_(self._host, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    @property
    def pending(self) -> bool:
        """Whether :meth:`read` may have to wait."""
        return self._copied is not None

    def read(self) -> torch.Tensor:
        """Wait for the copy and return it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host
