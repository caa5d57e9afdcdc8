"""Replace the state after a first hop by that of another fact that reaches the same entity."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.tasks import ComposedFacts
from open_mythos.evaluation.frozen import frozen
from open_mythos.model.mythos import OpenMythos


def replaced(
    model: OpenMythos, task: ComposedFacts, ids_BT: Tensor, answers_B: Tensor, n_loops: int
) -> dict[str, float]:
    """Return the share of chains answered with three kinds of states of their first hop.

    Args:
        model: Looped model.
        task: Task of the chains.
        ids_BT: Chains; only those with both replacements are asked.
        answers_B: Their answers.
        n_loops: Number of loops, before each of which the state at position 1 is replaced.

    Returns:
        "own": as they are; "known", "lone": with the state of a fact of that kind.
    """
    found = {kind: task.first_hops(ids_BT, lone=kind == "lone") for kind in ("known", "lone")}
    both_B = torch.stack([there_B for _, there_B in found.values()]).all(0)
    asked_BT, answers_B = ids_BT[both_B], answers_B[both_B]
    sources = {"own": asked_BT} | {kind: rows_BT[both_B] for kind, (rows_BT, _) in found.items()}
    with frozen(model, torch.float32):
        logits = {
            kind: with_states_of(model, asked_BT, rows_BT, n_loops)
            for kind, rows_BT in sources.items()
        }
    return {
        kind: float((logits_BV.argmax(-1) == answers_B).float().mean())
        for kind, logits_BV in logits.items()
    }


def with_states_of(model: OpenMythos, asked_BT: Tensor, sources_BT: Tensor, n_loops: int) -> Tensor:
    """Return the last logits (B, V) of chains with the states of ``sources_BT`` at position 1."""
    ids_BT = torch.cat([asked_BT, sources_BT])
    ctx = model.context(ids_BT)
    e_BTD = model.embed(ids_BT, ctx)
    h_BTD = model.recurrent.initial_state(e_BTD, ctx)
    for t in range(n_loops):
        asked_h_BTD, sources_h_BTD = h_BTD.chunk(2)
        asked_h_BTD[:, 1] = sources_h_BTD[:, 1]
        h_BTD = model.step(h_BTD, e_BTD, t, ctx)
    return model.logits(h_BTD, ctx)[: len(asked_BT), -1]
