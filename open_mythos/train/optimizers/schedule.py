"""The learning rate as a pure function of the step: linear warm-up, then one of several shapes.

It is above zero at every step, since a step at zero would only change the optimizer's moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from open_mythos.checks import checked
from open_mythos.train.config import OptimConfig, TrainConfig


def _cosine(step: int, config: TrainConfig) -> float:
    """Half a cosine from 1, right after the warm-up, towards ``min_lr_ratio`` at the end."""
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return _between(0.5 * (1 + math.cos(math.pi * min(1.0, progress))), config)


def _wsd(step: int, config: TrainConfig) -> float:
    """1 until the last ``decay_steps``, then down: warm-up, stable, decay (arXiv 2404.06395)."""
    progress = (step - (config.steps - config.decay_steps)) / config.decay_steps
    progress = min(1.0, max(0.0, progress))
    return _between(1 - (math.sqrt(progress) if config.decay_shape == "sqrt" else progress), config)


def _between(share: float, config: TrainConfig) -> float:
    """``min_lr_ratio`` at share 0, 1 at share 1."""
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * share


SCHEDULES: dict[str, Callable[[int, TrainConfig], float]] = {
    "cosine": _cosine,
    "wsd": _wsd,
    "constant": lambda step, config: 1.0,
}
"""Schedule name -> ``share(step, config)`` of the learning rate after the warm-up."""


@checked
def learning_rate(step: int, train: TrainConfig, optim: OptimConfig) -> float:
    """Learning rate of optimizer step ``step``, counted from 0."""
    if step < train.warmup_steps:
        return optim.lr * (step + 1) / train.warmup_steps
    return optim.lr * SCHEDULES[train.schedule](step, train)
