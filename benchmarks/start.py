"""Startup time of the command line and the import, each in a fresh process."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.measure import Finding, GateError, Measured
from benchmarks.models import FULL, Scale

ROOT = Path(__file__).resolve().parent.parent
IMPORT = "import open_mythos, sys; sys.exit('torch' in sys.modules)"
COMMANDS = {
    "import open_mythos (torch not loaded)": (("-c", IMPORT), 0.3, ""),
    "open-mythos --help": (("-m", "open_mythos", "--help"), 2.0, "usage: open-mythos"),
    "python alone": (("-c", ""), None, ""),
    "import torch": (("-c", "import torch"), None, ""),
}
"""Row -> (Python arguments, limit in seconds, prefix of the output)."""


def title(scale: Scale) -> str:
    """What the rows have in common."""
    return "starting, in a fresh process each time"


def rows(scale: Scale) -> Iterator[Measured]:
    """Yield the median seconds of each command.

    Raises:
        GateError: A command fails, prints something else, or importing the package loads torch.
    """
    for name, (arguments, goal, begins) in COMMANDS.items():
        _run(name, arguments, begins)  # warm the bytecode and disk caches
        taken = [_run(name, arguments, begins) for _ in range(scale.turns)]
        yield Finding(
            name, "-", statistics.median(taken), "s", goal=goal if scale is FULL else None,
            at_most=True, seconds=statistics.median(taken), numbers={"worst": max(taken)},
            why=f"the slowest of {len(taken)} took {max(taken):.2f} s",
        )  # fmt: skip


def _run(name: str, arguments: Sequence[str], begins: str) -> float:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    taken = time.perf_counter() - start
    if done.returncode or not done.stdout.startswith(begins):
        raise GateError(f"{name} ended with {done.returncode}: {done.stderr[-300:]}")
    return taken
