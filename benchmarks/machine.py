"""Record of the machine under test: hardware, versions, load; no host names or paths."""

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
"""Load average per core above which a warning is printed before a run."""


def describe() -> dict[str, Any]:
    """Return processor, accelerator, cores, threads, load, versions and commit, JSON-ready."""
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
        "commit": commit() or "unknown",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def accelerator() -> str | None:
    """Return the name of the GPU under test; None on a CPU."""
    return torch.cuda.get_device_name(device()) if device().type == "cuda" else None


def slug(description: dict[str, Any]) -> str:
    """Return the results folder of this machine: processor, accelerator and threads.

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
    """Return a warning if the machine is busy before the run, else None."""
    load, cores = description["load_before"], description["cores"]
    if load <= QUIET * cores:
        return None
    text = (
        f"the machine is busy: load average {load} on {cores} cores. Ratios, measured interleaved, "
        "are still meaningful; absolute times are too long"
    )
    if description["threads"] > 1 and not os.environ.get("OMP_WAIT_POLICY"):
        text += " (many times too long where threads spin: set OMP_WAIT_POLICY=PASSIVE)"
    return text


class OtherLoad:
    """CPU use of other processes between construction and :meth:`share`."""

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float | None:
        """Return the share of all cores; None where /proc/stat is missing."""
        wall, busy, own = (
            None if now is None or before is None else now - before
            for now, before in zip(self._now(), self._start, strict=True)
        )
        if busy is None or not wall or own is None:
            return None
        return max(0.0, busy - own) / wall / (os.cpu_count() or 1)

    @staticmethod
    def _now() -> tuple[float, float | None, float]:
        """Return seconds of wall time, of all busy cores, and of this process and its children."""
        times = os.times()
        return time.monotonic(), _busy_seconds(), sum(times[:4])


def _busy_seconds() -> float | None:
    """Return busy seconds of all cores since boot, including steal time; None if unknown."""
    try:
        line = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, line.split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _processor() -> str:
    """Return the processor's name, or its architecture where the name is unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Return the commit, with "-dirty" if code differs from it; "" outside a repository."""
    outputs = []
    for command in (
        ["git", "describe", "--always", "--abbrev=12"],
        ["git", "status", "--porcelain", "--untracked-files=no", "--", ".",
         ":!*/results", ":!docs/speed", ":!docs/speed.md"],
    ):  # fmt: skip
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return ""
        outputs.append(done.stdout.strip())
    return outputs[0] + ("-dirty" if outputs[1] else "")
