"""Context managers that make one step of a trainer non-finite, ``inject(trainer, value)``.

Each acts in its own process alone: a test of several processes uses it in one of them.
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
    """Multiply the loss, and so its gradient, by ``value``."""
    plain = module.head_loss

    def injected(*args: Any, **options: Any) -> Any:
        return plain(*args, **options) * value

    with patch.object(module, "head_loss", injected):
        yield


@contextmanager
def gradient_element(trainer: Trainer, value: float) -> Iterator[None]:
    """Set one element of one gradient to ``value``; the loss stays finite."""

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
    """Set one element of the state after loop ``loop`` to ``value``."""

    @contextmanager
    def inject(trainer: Trainer, value: float) -> Iterator[None]:
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

    return inject


LOOPS = 3
NONFINITE: dict[str, Callable[[Trainer, float], AbstractContextManager[None]]] = {
    "the loss": loss,
    "one element of a gradient": gradient_element,
    **{f"an activation at loop {loop}": activation(loop) for loop in range(LOOPS)},
}
VALUES = (float("nan"), float("inf"), float("-inf"))
