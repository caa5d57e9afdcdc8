"""Number of loops of each training sequence: a pure function of (seed, step, sample).

Micro-batches, world sizes and resumed runs therefore agree on every depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from open_mythos.checks import checked
from open_mythos.seeding import derive_seed
from open_mythos.train.config import DepthConfig


def _fixed(config: DepthConfig, mean: float, rng: np.random.Generator) -> int:
    """Always the mean; a curriculum rounds it."""
    return round(mean)


def _uniform(config: DepthConfig, mean: float, rng: np.random.Generator) -> int:
    """Each of low .. high equally often."""
    return int(rng.integers(config.low, config.high, endpoint=True))


def _poisson(config: DepthConfig, mean: float, rng: np.random.Generator) -> int:
    """Poisson(mean), zero becoming one (which adds exp(-mean) to the mean)."""
    return max(1, int(rng.poisson(mean)))


def _lognormal_poisson(config: DepthConfig, mean: float, rng: np.random.Generator) -> int:
    """tau ~ N(log mean - sigma^2 / 2, sigma), then Poisson(e^tau) + 1 (arXiv 2502.05171)."""
    tau = rng.normal(np.log(mean) - config.sigma**2 / 2, config.sigma)
    return int(rng.poisson(np.exp(tau))) + 1


def _mixed(config: DepthConfig, mean: float, rng: np.random.Generator) -> int:
    """The mean, and for a share of the sequences 1 .. 2 mean; a curriculum rounds the mean."""
    depth = round(mean)
    if rng.random() >= config.mixed_share:
        return depth
    return int(rng.integers(1, 2 * depth, endpoint=True))


DEPTH_PLANS: dict[str, Callable[[DepthConfig, float, np.random.Generator], int]] = {
    "fixed": _fixed,
    "uniform": _uniform,
    "poisson": _poisson,
    "lognormal_poisson": _lognormal_poisson,
    "mixed": _mixed,
}
"""Plan name -> ``draw(config, mean of this step, generator of this sample)``."""


class DepthPlan:
    """Draws the depths of a run; validates and copies ``config``.

    Raises:
        ConfigError: The configuration is invalid.
    """

    @checked
    def __init__(self, config: DepthConfig, seed: int) -> None:
        config.validate()
        self.config, self.seed = replace(config), seed
        self._draw = DEPTH_PLANS[config.plan]

    def mean_at(self, step: int) -> float:
        """Return the mean depth at ``step``, from 0; it grows during a curriculum."""
        config = self.config
        done = min(1.0, step / config.curriculum_steps) if config.curriculum_steps else 1.0
        if config.curriculum_shape == "sqrt":
            done = 1 - math.sqrt(1 - done)
        return config.curriculum_start + done * (config.mean - config.curriculum_start)

    def depths(self, step: int, sample_index_B: Tensor | Iterable[int]) -> Tensor:
        """Return (B,) int64 depths >= 1 of the samples with these global numbers, on the CPU."""
        samples = sample_index_B.tolist() if isinstance(sample_index_B, Tensor) else sample_index_B
        depths_B = torch.tensor([self._depth(step, int(sample)) for sample in samples])
        return depths_B + self.further_loops(step)

    def further_loops(self, step: int) -> int:
        """Return the extra loops of every sequence of ``step``, mostly 0, log-uniform otherwise.

        After Bansal et al. (arXiv 2202.05826, section 4).
        """
        config = self.config
        rng = np.random.default_rng(derive_seed(self.seed, "long", step))
        if rng.random() >= config.long_share:
            return 0
        return round(config.long_loops ** rng.random())

    def _depth(self, step: int, sample: int) -> int:
        seed = derive_seed(self.seed, "depth", step, sample)
        depth = self._draw(self.config, self.mean_at(step), np.random.default_rng(seed))
        return depth if self.config.max_loops is None else min(depth, self.config.max_loops)
