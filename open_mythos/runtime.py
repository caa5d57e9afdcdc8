"""Seeds, devices and dtypes: the only module that asks the machine what it has.

All randomness of the library is a pure function of (seed, stream name, indices), never of call
order, rank or local batch shape, so that resuming, changing the world size and batching share one
mechanism.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

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


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of ``x``, which lies on the host, that the host does not wait for."""
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def launched() -> bool:
    """Whether a launcher such as ``torchrun`` started this process as one of a group."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def local_rank() -> int:
    """Number of this process among those of its machine; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def rank() -> int:
    """Number of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def over_ranks(values: Sequence[float], device: torch.device) -> list[list[float]]:
    """For each of ``values``, those of all processes in the order of their ranks, as float64."""
    if world_size() == 1:
        return [[value] for value in values]
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone).T.tolist()


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
