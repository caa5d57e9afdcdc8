"""Defects that the harness must catch: what it says of sound code would be worth nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from open_mythos.train import Trainer
from open_mythos.train.checkpoint import saver as saving
from open_mythos.train.checkpoint import write as writing


def _after_resume(change: Callable[[Trainer], None]) -> Callable[[Trainer], Any]:
    """A defect that shows when a run is resumed."""

    @contextmanager
    def defect(trainer: Trainer) -> Iterator[None]:
        plain = trainer.resume

        def resume(*args: Any, **options: Any) -> Any:
            state = plain(*args, **options)
            change(trainer)
            return state

        trainer.resume = resume
        yield

    return defect


def _forget_step(trainer: Trainer) -> None:
    trainer.state.step = 0


def _forget_moments(trainer: Trainer) -> None:
    trainer.optimizer.state.clear()


def _shift_one_weight(trainer: Trainer) -> None:
    with torch.no_grad():
        weight = trainer.model.head.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))


@contextmanager
def _depths_from_one_stream(trainer: Trainer) -> Iterator[None]:
    """Depths from a generator that goes on from call to call, as is usual."""
    stream = torch.Generator().manual_seed(0)

    def depths(step: int, samples: Any) -> Any:
        return torch.randint(1, 5, (len(samples),), generator=stream)

    with patch.object(trainer.stepper.plan, "depths", depths):
        yield


@contextmanager
def _written_in_place(trainer: Trainer) -> Iterator[None]:
    """Files appear under the final name one by one."""

    def publish_first(folder: Path, *content: Any) -> None:
        final = folder.with_name(folder.name.removeprefix(".unfinished-"))
        shutil.rmtree(final, ignore_errors=True)
        folder.rename(final)
        fill(final, *content)
        final.rename(folder)

    fill = writing.fill_folder
    with patch.object(writing, "fill_folder", publish_first):
        yield


@contextmanager
def _old_ones_go_first(trainer: Trainer) -> Iterator[None]:
    """Room is made before the new checkpoint is there."""
    plain = saving.write_checkpoint

    def write(directory: Path, *args: Any) -> Path:
        for path in writing.checkpoints(directory):
            shutil.rmtree(path)
        return plain(directory, *args)

    with patch.object(saving, "write_checkpoint", write):
        yield


@contextmanager
def _not_a_copy(trainer: Trainer) -> Iterator[None]:
    """A background save reads the weights while they change."""
    plain = saving.take_snapshot

    def take(*args: Any, **options: Any) -> Any:
        return plain(*args, **options | {"copy": False})

    with patch.object(saving, "take_snapshot", take):
        yield


@contextmanager
def _skipping_by_zero(trainer: Trainer) -> Iterator[None]:
    """A bad step is multiplied by zero instead of left out."""
    plain = torch.isfinite

    def always(value: torch.Tensor) -> torch.Tensor:
        for parameter in trainer.stepper.parameters:
            if parameter.grad is not None and not plain(parameter.grad).all():
                parameter.grad.mul_(0)
        return torch.ones_like(plain(value))

    with patch.object(torch, "isfinite", always):
        yield


CONTROLS: dict[str, Callable[[Trainer], AbstractContextManager[None]]] = {
    "resuming forgets the step": _after_resume(_forget_step),
    "resuming forgets the moments": _after_resume(_forget_moments),
    "resuming moves one weight by one bit": _after_resume(_shift_one_weight),
    "depths come from one stream": _depths_from_one_stream,
    "a checkpoint is written in place": _written_in_place,
    "old checkpoints go first": _old_ones_go_first,
    "a background save is no copy": _not_a_copy,
    "a bad step is multiplied by zero": _skipping_by_zero,
}
