"""Rules run for real: what they keep of the quality, how deep they go, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from experiments.c4_halting.rank import spearman
from open_mythos.data import Batch
from open_mythos.evaluation.early_exit import GivenDepths, Pass, deal, run_exits
from open_mythos.evaluation.frozen import frozen
from open_mythos.model.exit_rules import exit_rule
from open_mythos.model.mythos import OpenMythos


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
    """Every setting of a rule, each beside the same exits at random positions.

    Args:
        model: Trained.
        batches: What it is asked.
        n_loops: Most loops.
        name: Of the rule.
        specs: Its settings, as :func:`open_mythos.model.exit_rules.exit_rule` reads them.
        seed: Of the random exits.
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
    """The point of fewest loops whose accuracy is at least ``least``; None where none is."""
    good = [point for point in points if point["accuracy"] >= least]
    return min(good, key=lambda point: float(point["loops"])) if good else None


def hop_numbers(batch: Batch) -> Tensor:
    """(B, T) hops that each position asks for, in a single chain: its position."""
    return torch.arange(batch.targets.shape[1]).expand_as(batch.targets)


def ordering(exits_BT: Tensor, batch: Batch) -> float:
    """Spearman's rho of loops against hops, over all questions, labelled or not."""
    asked_BT = hop_numbers(batch) > 0
    return spearman(exits_BT[asked_BT].numpy(), hop_numbers(batch)[asked_BT].numpy())


def figures(done: Pass) -> dict[str, Any]:
    """Mean loops of all positions, loss and accuracy of the targets."""
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
