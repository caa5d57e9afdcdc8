"""Accuracy of a model at many depths in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from open_mythos.evaluation.frozen import frozen
from open_mythos.model.mythos import OpenMythos
from open_mythos.train.build import Model


def answered(
    model: Model, ids_BT: Tensor, answers_B: Tensor, loops: Sequence[int], rows: int = 4096
) -> list[float]:
    """Return the share of ``ids_BT`` whose top next token is the answer, for each depth.

    The loops (rising) run once, up to the largest. A dense model has a single share. ``rows`` is
    the batch size.
    """
    right = [0.0] * (len(loops) if isinstance(model, OpenMythos) else 1)
    with frozen(model, torch.float32) as device:
        for ids_RT, answers_R in zip(ids_BT.split(rows), answers_B.split(rows), strict=True):
            found = _right(model, ids_RT.to(device), answers_R.to(device), loops)
            right = [sum(pair) for pair in zip(right, found, strict=True)]
    return [count / len(ids_BT) for count in right]


def _right(model: Model, ids_BT: Tensor, answers_B: Tensor, loops: Sequence[int]) -> list[float]:
    """Count right answers at each depth."""
    if not isinstance(model, OpenMythos):
        return [_count(model(ids_BT), answers_B)]
    return [
        _count(model.logits(h_BTD), answers_B)
        for t, h_BTD in model.unroll(ids_BT, max(loops))
        if t + 1 in loops
    ]


def _count(logits_BTV: Tensor, answers_B: Tensor) -> float:
    return float((logits_BTV[:, -1].argmax(-1) == answers_B).sum())
