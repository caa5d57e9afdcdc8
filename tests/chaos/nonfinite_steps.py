"""Ways to make one step of a trainer go wrong.

Each is ``poison(trainer, value)``, a context within which it acts, in this process alone: a test of
several processes uses it in one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from open_mythos.train import Trainer
from open_mythos.train import loss as module


@contextmanager
def loss(trainer: Trainer, value: float) -> Iterator[None]:
    """The loss is multiplied by ``value``, and its gradient follows from it."""
    plain = module.linear_cross_entropy

    def poisoned(*args: Any, **options: Any) -> Any:
        return plain(*args, **options) * value

    with patch.object(module, "linear_cross_entropy", poisoned):
        yield


@contextmanager
def gradient_element(trainer: Trainer, value: float) -> Iterator[None]:
    """One element of one gradient is ``value``; the loss is fine."""

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        changed = gradient.clone()
        changed.view(-1)[3] = value
        return changed

    handle = trainer.model.recurrent.injection.log_A.register_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def activation(loop: int) -> Callable[[Trainer, float], AbstractContextManager[None]]:
    """One element of the state after loop ``loop`` is ``value``."""

    @contextmanager
    def poison(trainer: Trainer, value: float) -> Iterator[None]:
        recurrent = trainer.model.recurrent
        plain = recurrent.step

        def step(h: Any, drive: Any, t: int, *args: Any, **options: Any) -> Any:
            out = plain(h, drive, t, *args, **options)
            if t == loop:
                out = out.clone()
                out[0, 0, 0] = value
            return out

        with patch.object(recurrent, "step", step):
            yield

    return poison


LOOPS = 3
POISONS: dict[str, Callable[[Trainer, float], AbstractContextManager[None]]] = {
    "the loss": loss,
    "one element of a gradient": gradient_element,
    **{f"an activation at loop {loop}": activation(loop) for loop in range(LOOPS)},
}
VALUES = (float("nan"), float("inf"), float("-inf"))
