"""Run the cells of a claim in parallel and record each result as soon as it finishes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.machine import commit as current_commit
from experiments import machine
from experiments.claim import Cell, Place, Record
from experiments.results import Results, plain
from experiments.table import experiment
from open_mythos.checks import check_count
from open_mythos.errors import EnvironmentError_, MythosError
from open_mythos.train import PreemptedError


class CellsFailedError(MythosError):
    """Some cells raised an error and were not recorded."""


@dataclass(frozen=True)
class Job:
    """A cell and what a worker process needs to run it."""

    claim: str
    scale: str
    cell: Cell
    place: Place
    threads: int
    workers: int


@dataclass(frozen=True)
class Outcome:
    """The record of a cell, or the traceback of its failure."""

    cell: Cell
    record: Record | None
    error: str = ""


def run_cells(
    claim: str,
    scale: str,
    cells: Sequence[Cell],
    results: Results,
    work: Path,
    *,
    workers: int = 0,
    quiet: bool = False,
) -> list[Record]:
    """Run the unfinished cells and return the records of all of them.

    Args:
        claim: Id of the claim.
        scale: "cpu", "gpu" or "quick".
        cells: Cells to run, longest first to balance the load.
        results: Store of finished cells.
        work: Folder for prepared text and for checkpoints of unfinished cells.
        workers: Worker processes, which share the cores. 0: one per core, or one on a GPU.
        quiet: Hide the progress bar.

    Raises:
        ConfigError: A finished cell was recorded with different settings.
        CellsFailedError: Some cells raised an error; the others are recorded.
        EnvironmentError_: A worker process died; cells that had finished are recorded.
    """
    default = 1 if scale == "gpu" else machine.cores()
    pending = [cell for cell in cells if results.find(cell) is None]
    at_once = min(check_count("--workers", workers or default), max(1, len(pending)))
    threads = max(1, machine.cores() // at_once)

    def place(cell: Cell) -> Place:
        own = f"{claim}-{scale}"
        return Place(work, work / "models" / own, work / "unfinished" / f"{own}-{cell.name}")

    jobs = [Job(claim, scale, cell, place(cell), threads, at_once) for cell in pending]
    commit, failures = current_commit(), list[Outcome]()
    with _progress(quiet) as progress, closing(_outcomes(jobs, at_once)) as outcomes:
        task = progress.add_task(claim, total=len(cells), completed=len(cells) - len(jobs), cell="")
        for job, outcome in outcomes:
            if outcome.record is None:
                failures.append(outcome)
                message = f"failed: {outcome.cell.name}\n{outcome.error}"
                progress.console.print(message, markup=False, style="red")
            else:
                results.write(replace(outcome.record, commit=commit))
                shutil.rmtree(job.place.own, ignore_errors=True)
            progress.update(task, advance=1, cell=outcome.cell.name)
    if failures:
        names = ", ".join(outcome.cell.name for outcome in failures)
        raise CellsFailedError(
            f"{len(failures)} of {len(cells)} cells failed", where=names,
            value=failures[0].error.strip().rpartition("\n")[2],
            fix="fix the cause and rerun the same command: finished cells are kept",
        )  # fmt: skip
    return results.of(cells)


def _outcomes(jobs: Sequence[Job], workers: int) -> Generator[tuple[Job, Outcome]]:
    """Yield outcomes in completion order."""
    if workers == 1:
        yield from ((job, attempt(job)) for job in jobs)
        return
    others = set(multiprocessing.active_children())
    # spawn: a forked child of a process that has used threads or CUDA may hang
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_depend_on_the_parent)
    try:
        futures = {pool.submit(attempt, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise EnvironmentError_(
            "a worker process died", where="experiments run", value=str(error),
            fix="rerun the command: finished cells are kept. If memory ran out, lower --workers",
        ) from error  # fmt: skip
    except BaseException:
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _depend_on_the_parent() -> None:
    """Ignore Ctrl-C in a worker, and exit when the parent process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def attempt(job: Job) -> Outcome:
    """Run one cell in this process with the job's number of threads."""
    threads, clock = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(job.threads)
    try:
        figures = experiment(job.claim).run_cell(job.cell, job.place)
    except PreemptedError as error:
        raise KeyboardInterrupt from error
    except Exception:
        return Outcome(job.cell, None, traceback.format_exc(limit=-4))
    finally:
        torch.set_num_threads(threads)
    record = Record(
        claim=job.claim, scale=job.scale, arm=job.cell.arm, seed=job.cell.seed,
        settings=plain(job.cell.settings), figures=plain(figures),
        seconds=round(time.perf_counter() - clock, 2),
        machine=machine.hardware(job.threads, job.workers), versions=machine.versions(), commit="",
    )  # fmt: skip
    return Outcome(job.cell, record)


def _progress(quiet: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(),
        TextColumn("{task.completed}/{task.total} cells"), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[cell]}"),
        console=Console(stderr=True), disable=quiet,
    )  # fmt: skip
