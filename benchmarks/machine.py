"""What the figures were taken on: hardware, versions, other work; no names and no paths."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import device, wait_policy

ROOT = Path(__file__).resolve().parent.parent


QUIET = 0.25
"""Load average per core up to which the machine counts as quiet before a run."""
FOREIGN = 0.05
"""Share of all cores that others may take during a run that counts as undisturbed."""


def describe() -> dict[str, Any]:
    """Processor, accelerator, cores, threads, load, versions and commit, JSON-ready."""
    return {
        "processor": _processor(),
        "accelerator": accelerator(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "wait_policy": wait_policy(),
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def accelerator() -> str | None:
    """Name of the GPU that is measured; None on a CPU."""
    return torch.cuda.get_device_name(device()) if device().type == "cuda" else None


def slug(description: dict[str, Any]) -> str:
    """The folder of this machine's results: processor, accelerator and threads, no host's name.

    >>> slug({"processor": "Some(R) Chip CPU @ 2.60GHz", "accelerator": None, "threads": 2})
    'some-chip-2-threads'
    """
    parts = [description["processor"], description.get("accelerator") or ""]
    text = " ".join(parts).lower()
    text = re.sub(r"\((r|tm)\)|@.*?hz|\b(processor|cpu)\b", " ", text)
    n = description["threads"]
    words = [*re.findall(r"[a-z0-9.]+", text), str(n), "threads" if n > 1 else "thread"]
    return "-".join(words)


def warning(description: dict[str, Any]) -> str | None:
    """What to say before a run on a machine that is busy with something else."""
    load, cores = description["load_before"], description["cores"]
    if load <= QUIET * cores:
        return None
    text = (
        f"the machine is not quiet: load average {load} on {cores} cores. Ratios are taken side by "
        "side and still mean something; times are too long"
    )
    if description["threads"] > 1 and not os.environ.get("OMP_WAIT_POLICY"):
        text += " (many times too long where threads spin: set OMP_WAIT_POLICY=PASSIVE)"
    return text


class Neighbours:
    """How much of the cores others took between the making of this object and :meth:`share`."""

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float | None:
        """Share of all cores; None where the system does not tell."""
        wall, busy, own = (
            None if now is None or before is None else now - before
            for now, before in zip(self._now(), self._start, strict=True)
        )
        if busy is None or not wall or own is None:
            return None
        return max(0.0, busy - own) / wall / (os.cpu_count() or 1)

    @staticmethod
    def _now() -> tuple[float, float | None, float]:
        """Seconds: of the clock, of all busy cores, of this process and its children."""
        times = os.times()
        return time.monotonic(), _busy_seconds(), sum(times[:4])


def _busy_seconds() -> float | None:
    """Seconds in which cores have worked since the start, stolen ones included."""
    try:
        line = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, line.split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _processor() -> str:
    """The processor's name; the architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit, marked where files differ from it; "unknown" outside a repository.

    Results are not code: those that earlier suites of the same run have saved mark nothing.
    """
    found = []
    for command in (
        ["git", "describe", "--always", "--abbrev=12"],
        ["git", "status", "--porcelain", "--untracked-files=no", "--", ".",
         ":!benchmarks/results", ":!docs/speed", ":!docs/speed.md"],
    ):  # fmt: skip
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
        found.append(done.stdout.strip())
    return found[0] + ("-dirty" if found[1] else "")
