"""Describe the hardware and software versions of a record, without names or paths."""

from __future__ import annotations

import os
import platform

import torch


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def hardware(threads: int, workers: int) -> str:
    """Describe the processor, the accelerator if any, and how workers share them."""
    device = torch.cuda.get_device_name() + ", " if torch.cuda.is_available() else ""
    return (
        f"{device}{platform.machine()}, {cores()} cores, {workers} at a time, "
        f"{threads} thread{'s' if threads > 1 else ''} each"
    )


def versions() -> str:
    """Return the versions of Python and PyTorch."""
    return f"Python {platform.python_version()}, PyTorch {torch.__version__}"
