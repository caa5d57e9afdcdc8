"""What experiments on synthetic tasks share: questions asked at many depths, and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from open_mythos.evaluation.frozen import frozen
from open_mythos.model.mythos import OpenMythos
from open_mythos.train.build import Model


def answered(
    model: Model, ids_BT: Tensor, answers_B: Tensor, loops: Sequence[int], rows: int = 4096
) -> list[float]:
    """Share of rows whose most likely last token is the answer, at each number of loops.

    The loops are run once, up to the most. A dense model has one figure, whatever ``loops`` says.

    Args:
        model: A looped or a dense model.
        ids_BT: Questions.
        answers_B: The token that should follow each.
        loops: Depths, rising.
        rows: Questions computed at a time.
    """
    right = [0.0] * (len(loops) if isinstance(model, OpenMythos) else 1)
    with frozen(model, torch.float32) as device:
        for ids_RT, answers_R in zip(ids_BT.split(rows), answers_B.split(rows), strict=True):
            found = _right(model, ids_RT.to(device), answers_R.to(device), loops)
            right = [sum(pair) for pair in zip(right, found, strict=True)]
    return [count / len(ids_BT) for count in right]


def _right(model: Model, ids_BT: Tensor, answers_B: Tensor, loops: Sequence[int]) -> list[float]:
    """Right answers at each depth."""
    if not isinstance(model, OpenMythos):
        return [_count(model(ids_BT), answers_B)]
    return [
        _count(model.logits(h_BTD), answers_B)
        for t, h_BTD in model.unroll(ids_BT, max(loops))
        if t + 1 in loops
    ]


def _count(logits_BTV: Tensor, answers_B: Tensor) -> float:
    return float((logits_BTV[:, -1].argmax(-1) == answers_B).sum())


class Curves:
    """A logger for a trainer that keeps some of the metrics.

    Args:
        names: Of the metrics to keep; others are passed over.
    """

    def __init__(self, *names: str) -> None:
        self.points: dict[str, list[tuple[int, Any]]] = {name: [] for name in names}

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Keep those of ``metrics`` that were asked for."""
        for name, points in self.points.items():
            if name in metrics:
                points.append((step, metrics[name]))
