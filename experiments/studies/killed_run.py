"""Compare a repeatedly killed training run with an uninterrupted one.

``python -m experiments.studies.killed_run`` runs ``training/debug_cpu.py`` twice. One run is ended
by SIGKILL at random times fixed by a seed and restarted with ``--resume auto`` each time. Writes a
JSON file and a plot, and fails if the curves differ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import machine
from experiments.figure import COLOURS, panels
from experiments.studies.common import ROOT

RECIPE = ROOT / "training" / "debug_cpu.py"
RESULTS = ROOT / "experiments" / "studies" / "results" / "killed_run.json"
PICTURE = ROOT / "docs" / "training" / "killed_run.png"
OPTIONS = ["--train.log_every", "1", "--train.save_every", "10", "--quiet"]
KILLS = 4
COMPARED = ("loss", "lr", "grad_norm", "depth_histogram", "tokens")


def main() -> int:
    """Run both trainings, compare them and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--processes", type=int, default=1, help="processes per run, started by torchrun"
    )
    processes = parser.parse_args().processes
    with tempfile.TemporaryDirectory() as folder:
        whole, hurt = Path(folder) / "whole", Path(folder) / "killed"
        finish(start(whole, processes))
        curve = lines(whole)
        kills = kill_and_resume(hurt, len(curve), processes)
        again = lines(hurt)
    differing = [
        step for step, line in curve.items()
        if any(again.get(step, {}).get(name) != line[name] for name in COMPARED)
    ]  # fmt: skip
    found = {
        "command": "python -m experiments.studies.killed_run", "recipe": RECIPE.name,
        "processes": processes, "machine": machine.describe(), "kills": kills,
        "steps": len(curve), "steps_that_differ": differing, "compared": list(COMPARED),
        "whole": {step: line["loss"] for step, line in curve.items()},
        "killed": {step: line["loss"] for step, line in again.items()},
    }  # fmt: skip
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found)
    console = Console()
    for kill in kills:
        console.print(f"killed after step {kill['after']}, resumed from step {kill['from']}")
    console.print(f"{len(curve)} steps, {len(differing)} differ in {', '.join(COMPARED)}")
    return 1 if differing else 0


def start(out: Path, processes: int) -> subprocess.Popen[bytes]:
    """Start the recipe in its own process group."""
    command = [sys.executable, str(RECIPE)]
    if processes > 1:
        command = [
            sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
            "--master_port", "29655", str(RECIPE),
        ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options = [*OPTIONS, "--train.out_dir", str(out), "--resume", "auto"]
    return subprocess.Popen([*command, *options], env=environment, start_new_session=True)


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a run to end and require exit code 0."""
    if process.wait() != 0:
        raise SystemExit(f"{RECIPE.name} ended with {process.returncode}")


def kill_and_resume(out: Path, steps: int, processes: int) -> list[dict[str, int]]:
    """Kill and restart the run at seeded random steps, then let it finish."""
    draws = random.Random(0)
    kills = []
    for step in sorted(draws.sample(range(3, steps - 3), KILLS)):
        process = start(out, processes)
        while process.poll() is None and max(lines(out), default=0) < step:
            time.sleep(0.01)
        time.sleep(draws.random() * 0.2)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills.append({"after": max(lines(out), default=0), "from": newest(out)})
    finish(start(out, processes))
    return kills


def lines(out: Path) -> dict[int, dict[str, Any]]:
    """Return step -> metrics; a later line of the same step wins."""
    path = out / "metrics.jsonl"
    found: dict[int, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # a truncated line of a killed run
        if "loss" in line:
            found[line["step"]] = line
    return found


def newest(out: Path) -> int:
    """Return the step of the newest checkpoint, or 0."""
    folders = (out / "checkpoints").glob("step_*")
    return max((int(path.name.removeprefix("step_")) for path in folders), default=0)


def draw(found: dict[str, Any]) -> None:
    """Plot both curves and the recomputed steps."""
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    with panels(PICTURE, 1) as (ax,):
        ax.plot(*zip(*found["whole"].items(), strict=True), color=COLOURS[1], lw=4, alpha=0.5,
                label="uninterrupted")  # fmt: skip
        ax.plot(*zip(*found["killed"].items(), strict=True), color=COLOURS[0], lw=1.2,
                label=f"killed {len(found['kills'])} times")  # fmt: skip
        for kill in found["kills"]:
            ax.axvspan(kill["from"], kill["after"], color=COLOURS[3], alpha=0.15, lw=0)
        ax.set(title="debug_cpu.py (shaded: lost and recomputed)", xlabel="step",
               ylabel="loss, nats per byte")  # fmt: skip
        ax.legend()


if __name__ == "__main__":
    sys.exit(main())
