"""Train the demo's models two at a time, since one small model cannot use two cores."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.c1_depth import chain_recipe as chains
from experiments.c11_reasoning import sudoku_recipe as sudoku
from experiments.demo.results import Curve
from experiments.machine import cores
from experiments.tasks import TaskLoader
from experiments.tasks.saved import keep
from open_mythos.accounting import account
from open_mythos.hub.pretrained import from_pretrained, save_pretrained
from open_mythos.train import RunConfig, Trainer, build_model, build_run
from open_mythos.train.build import Model


@dataclass(frozen=True)
class Job:
    """One model to train."""

    task: str
    """"chains", "sudoku" or "text"."""
    label: str
    config: RunConfig
    folder: Path
    """Output folder of the model."""


@dataclass(frozen=True)
class Trained:
    """A finished training."""

    model: Model
    curve: Curve
    rows: list[dict[str, Any]]
    """Evaluation on text by depth; empty for other tasks."""
    tokens: int
    """Training targets."""


def train_all(jobs: Sequence[Job], quiet: bool) -> list[Trained]:
    """Train every job in its own process, two at a time if there are two cores."""
    at_once = min(2, cores())
    threads = max(1, cores() // at_once)
    # spawn: a forked child of a process that has used threads may hang
    context = multiprocessing.get_context("spawn")
    with (
        context.Manager() as manager,
        _watched(jobs, manager.Queue(), quiet) as news,
        ProcessPoolExecutor(at_once, mp_context=context) as pool,
    ):
        each = zip(*((job, i, news, threads) for i, job in enumerate(jobs)), strict=True)
        found = list(pool.map(_train, *each))
    return [
        Trained(from_pretrained(job.folder).eval(), *rest)
        for job, rest in zip(jobs, found, strict=True)
    ]


class _Listener:
    """A logger that keeps the curve and reports progress to the parent process."""

    def __init__(self, number: int, news: Any) -> None:
        self.steps: list[int] = []
        self.loss: list[float] = []
        self.rows: list[dict[str, Any]] = []
        self._number, self._news = number, news

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record the loss and the evaluation."""
        self.rows = metrics.get("eval/depths", self.rows)
        if "loss" in metrics:
            self.steps.append(step)
            self.loss.append(metrics["loss"])
            self._news.put((self._number, step, metrics["loss"]))


def _train(
    job: Job, number: int, news: Any, threads: int
) -> tuple[Curve, list[dict[str, Any]], int]:
    """Train and save in a worker; return curve, evaluation rows and tokens."""
    torch.set_num_threads(threads)
    clock, listener, config = time.perf_counter(), _Listener(number, news), job.config
    if job.task == "text":
        run = build_run(config, loggers=[listener])
        trainer = run.trainer
    elif job.task == "sudoku":
        rows = TaskLoader(sudoku.TASK, global_batch=config.train.global_batch)
        trainer = Trainer(sudoku.untrained(config), rows, config, loggers=[listener])
    else:
        trainer = Trainer(build_model(config), chains.chains(config), config, loggers=[listener])
    trainer.fit()
    counts, depth = account(trainer.model, context=config.train.seq_len), config.depth
    loops = (
        (depth.expected + depth.expected_further, depth.expected) if trainer.stepper.looped else ()
    )
    curve = Curve(
        job.label, counts.parameters, counts.training_flops(*loops), listener.steps,
        listener.loss, time.perf_counter() - clock,
    )  # fmt: skip
    if job.task == "text":
        save_pretrained(trainer.model, job.folder)
        run.describe(job.folder)
    else:
        keep(trainer.model, sudoku.TASK if job.task == "sudoku" else chains.TASK, job.folder)
    return curve, listener.rows, trainer.state.tokens


@contextmanager
def _watched(jobs: Sequence[Job], news: Any, quiet: bool) -> Iterator[Any]:
    """Show a progress bar per job, updated from the yielded queue."""
    with Progress(
        TextColumn("  {task.description}"), BarColumn(),
        TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(), console=Console(stderr=True), disable=quiet,
    ) as progress:  # fmt: skip
        tasks = [
            progress.add_task(
                f"{job.task:6}  {job.label}",
                total=job.config.train.steps, loss="",
            )
            for job in jobs
        ]  # fmt: skip

        def follow() -> None:
            while (item := news.get()) is not None:
                number, step, loss = item
                progress.update(tasks[number], completed=step, loss=f"loss {loss:.3f}")

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield news
        finally:
            news.put(None)
            thread.join()
