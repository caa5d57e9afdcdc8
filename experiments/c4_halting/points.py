"""Measure exit rules: quality, depth, and order of exits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from open_mythos.data import Batch
from open_mythos.evaluation.early_exit import GivenDepths, Pass, deal, run_exits
from open_mythos.evaluation.frozen import frozen
from open_mythos.model.exit_rules import exit_rule
from open_mythos.model.mythos import OpenMythos

Numbers = npt.ArrayLike


def spearman(x: Numbers, y: Numbers) -> float:
    """Return Spearman's rho with mean ranks for ties, and 0 if one side is constant."""
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else 0.0


def _ranks(values: Numbers) -> npt.NDArray[np.float64]:
    _, place, count = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[place.reshape(-1)]


def measure(
    model: OpenMythos,
    batches: Sequence[Batch],
    n_loops: int,
    name: str,
    specs: Sequence[str],
    seed: int,
    *,
    chains: bool,
) -> list[dict[str, Any]]:
    """Measure every setting of a rule and the same exits at random positions.

    Args:
        model: Trained model.
        batches: Evaluation batches.
        n_loops: Maximum loops.
        name: Name of the rule.
        specs: Specs for :func:`open_mythos.model.exit_rules.exit_rule`.
        seed: Seed of the random exits.
        chains: Whether the one batch holds single chains, whose positions are hops.
    """
    found = []
    everything = n_loops * sum(batch.targets.numel() for batch in batches)
    with frozen(model, torch.float32):
        for spec in specs:
            done = run_exits(model, batches, n_loops, [exit_rule(spec, model)] * len(batches))
            dealt = [GivenDepths(exits) for exits in deal(done.exits, seed)]
            point = {"rule": name, "spec": spec, "computed": done.computed / everything}
            point |= figures(done)
            point["random"] = figures(run_exits(model, batches, n_loops, dealt))
            found.append(point | (_by_hops(done, batches[0]) if chains else {}))
    return found


def shallowest(points: Sequence[dict[str, Any]], least: float) -> dict[str, Any] | None:
    """Return the point with the fewest loops among those of accuracy ``least`` or more."""
    good = [point for point in points if point["accuracy"] >= least]
    return min(good, key=lambda point: float(point["loops"])) if good else None


def hop_numbers(batch: Batch) -> Tensor:
    """Return the hops (B, T) of each position of single chains: the position itself."""
    return torch.arange(batch.targets.shape[1]).expand_as(batch.targets)


def ordering(exits_BT: Tensor, batch: Batch) -> float:
    """Return Spearman's rho of loops against hops over all questions, labeled or not."""
    asked_BT = hop_numbers(batch) > 0
    return spearman(exits_BT[asked_BT].numpy(), hop_numbers(batch)[asked_BT].numpy())


def figures(done: Pass) -> dict[str, Any]:
    """Return mean loops of all positions, and loss and accuracy of the targets."""
    loops = torch.cat([exits.flatten() for exits in done.exits])
    return {
        "loops": float(loops.float().mean()),
        "loss": float(done.losses_N.double().mean()),
        "accuracy": float(done.right_N.double().mean()),
    }


def _by_hops(done: Pass, batch: Batch) -> dict[str, Any]:
    exits_BT = done.exits[0]
    hops_N = hop_numbers(batch)[batch.targets >= 0]
    return {
        "spearman": ordering(exits_BT, batch),
        "loops_by_hop": exits_BT[:, 1:].float().mean(0).tolist(),
        "accuracy_by_hop": [
            float(done.right_N[hops_N == hops].float().mean())
            for hops in range(2, batch.targets.shape[1])
        ],
    }
