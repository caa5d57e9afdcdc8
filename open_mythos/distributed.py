"""Ranks of the process group, and the launcher's environment variables."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

from open_mythos.errors import EnvironmentError_


def launched() -> bool:
    """Return whether a launcher such as ``torchrun`` started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def local_rank() -> int:
    """Return the rank of this process on its node; 0 without a launcher.

    Raises:
        EnvironmentError_: The launcher's variable holds no number.
    """
    found = os.environ.get("LOCAL_RANK", "0")
    if not (found.isascii() and found.isdecimal()):
        raise EnvironmentError_(
            "the launcher's variable holds no number", where="LOCAL_RANK", value=found,
            allowed="an integer >= 0", fix="start with torchrun, or unset it",
        )  # fmt: skip
    return int(found)


def rank() -> int:
    """Number of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def over_ranks(values: Sequence[float]) -> list[list[float]]:
    """Gather each of the host values ``values`` from all processes, in rank order.

    Sent as float64 over the CPU backend, so there is no sync with work queued on a GPU.
    """
    if world_size() == 1:
        return [[value] for value in values]
    # a process group created by the caller may have a CUDA backend only
    device = "cpu" if "cpu" in dist.get_backend_config() else "cuda"
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone).T.tolist()
