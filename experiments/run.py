"""``python -m experiments run``: run a claim, print its verdict, record its results."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console

from experiments import listing, report
from experiments.cell_pool import run_cells
from experiments.claim import QUICK
from experiments.results import Results
from experiments.table import committed_results, experiment
from open_mythos.errors import ConfigError

RUNS = Path("runs/experiments")


def run_claim(
    claim: str,
    *,
    scale: str = "cpu",
    quick: bool = False,
    record: bool = False,
    workers: int = 0,
    out: str = "",
    fresh: bool = False,
    quiet: bool = False,
) -> None:
    """Run the unfinished cells of ``claim`` and print its verdict; options as in ``run --help``.

    Raises:
        ConfigError: Unknown claim or scale, or conflicting options.
        CellsFailedError: Some cells raised an error.
        EnvironmentError_: A worker process died, or a result cannot be written.
    """
    console = Console()
    asked = experiment(claim)
    _check(asked.CLAIM.scales, scale, quick=quick, record=record, out=out)
    scale = QUICK if quick else scale
    folder = Path(out) if out else RUNS / claim / scale
    results = Results(committed_results(claim, scale) if record else folder)
    work = Path(out) / "work" if out else RUNS / "work"
    if fresh or quick:
        results.clear()
        for unfinished in (work / "unfinished").glob(f"{claim}-{scale}-*"):
            shutil.rmtree(unfinished)
    cells = asked.cells(scale)
    records = run_cells(
        claim, scale, cells, results, work, workers=1 if quick else workers, quiet=quiet
    )
    if quick:
        names = ", ".join(each.arm for each in records)
        console.print(f"{claim} runs ({names}); a quick run gives no verdict")
        return
    summary = asked.summarise(records)
    if not quiet:
        listing.show(asked.CLAIM, summary, console)
        console.print(f"{len(records)} cells: {results.folder}", highlight=False)
    if record:
        report.update(claim, scale)
    else:
        asked.plot(summary, results.folder / f"{claim}.png")


def _check(scales: tuple[str, ...], scale: str, *, quick: bool, record: bool, out: str) -> None:
    if scale not in scales:
        raise ConfigError(
            "the claim has no such scale", where="--scale", value=scale,
            allowed=" or ".join(scales), fix="choose a listed scale",
        )  # fmt: skip
    if not record:
        return
    if quick or out:
        raise ConfigError(
            "--record conflicts with --quick and --out", where="--record",
            value="--quick" if quick else f"--out {out}", allowed="neither --quick nor --out",
            fix="drop the conflicting option",
        )  # fmt: skip
    report.checkout()
