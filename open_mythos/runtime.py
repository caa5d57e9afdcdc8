"""Seeds, devices and dtypes: the only module that asks the machine what it has.

All randomness of the library is a pure function of (seed, stream name, indices), never of call
order, rank or local batch shape, so that resuming, changing the world size and batching share one
mechanism.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from open_mythos.errors import ConfigError, EnvironmentError_

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def derive_seed(seed: int, stream: str, *indices: int) -> int:
    """A 63-bit seed that depends on ``seed``, the stream's name and ``indices`` alone.

    Args:
        seed: The run's seed.
        stream: What the numbers are for, e.g. ``"depth"`` or ``"data"``.
        indices: Step, global sample index, loop, ... in an order fixed by the caller.
    """
    text = "/".join([str(int(seed)), stream, *(str(int(i)) for i in indices)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seeded_generator(seed: int, stream: str, *indices: int) -> torch.Generator:
    """A CPU ``torch.Generator`` seeded by :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, stream, *indices))


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


def resolve_dtype(name: str) -> torch.dtype:
    """The ``torch.dtype`` named "float32", "bfloat16" or "float16"."""
    if name not in DTYPES:
        raise ConfigError("unknown dtype", where="dtype", value=name, allowed=", ".join(DTYPES))
    return DTYPES[name]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Mixed precision at ``dtype``; nothing at all for float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def sync_to_disk(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def as_autocast(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` in the dtype of the enclosing autocast region; itself outside of one."""
    if not torch.is_autocast_enabled(weight.device.type):
        return weight
    return weight.to(torch.get_autocast_dtype(weight.device.type))
