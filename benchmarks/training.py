"""Training: forward and backward of one step. The optimizer, equal for both, is left out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.measure import Row, compare, gate
from benchmarks.models import FULL, Scale, build
from benchmarks.plain import plain_twin
from open_mythos.model import OpenMythos
from open_mythos.ops.cross_entropy import linear_cross_entropy
from open_mythos.runtime import autocast

GOALS = {(16, 2): 1.0, (64, 4): 1.5}
GATE_SHAPE = (2, 67)
"""Rows and tokens of the gate: small, and odd on purpose."""


def title(scale: Scale) -> str:
    """What the rows have in common."""
    return (
        f"training step (forward, backward), dim {scale.dim}, {scale.n_loops} loops, "
        f"{scale.batch} x {scale.tokens} tokens"
    )


def rows(scale: Scale) -> Iterator[Row]:
    """One row for every attention, number of experts and dtype."""
    for attn_type in ("mla", "gqa"):
        for experts in scale.experts:
            fast = build(scale, attn_type, experts)
            plain = plain_twin(fast)
            for dtype in (torch.float32, torch.bfloat16):
                yield _row(scale, fast, plain, attn_type, experts, dtype)


def _row(
    scale: Scale,
    fast: OpenMythos,
    plain: OpenMythos,
    attn_type: str,
    experts: tuple[int, int],
    dtype: torch.dtype,
) -> Row:
    name = f"{attn_type}, {experts[0]} experts top-{experts[1]}"
    small = _ids(*GATE_SHAPE)
    errors = gate(
        name,
        gradients(fast, small, scale.n_loops, dtype),
        gradients(plain, small, scale.n_loops, dtype),
        reference=gradients(plain, small, scale.n_loops, torch.float32),
        dtype=dtype,
    )
    ids = _ids(scale.batch, scale.tokens)
    return compare(
        name,
        dtype,
        lambda: gradients(fast, ids, scale.n_loops, dtype),
        lambda: gradients(plain, ids, scale.n_loops, dtype),
        alternations=scale.alternations,
        goal=GOALS[experts] if scale is FULL else None,
        errors=errors,
    )


def gradients(model: OpenMythos, ids_BT: Tensor, n_loops: int, dtype: torch.dtype) -> list[Tensor]:
    """The loss, the final hidden state and the gradient of every weight that has one."""
    model.zero_grad(set_to_none=True)
    with autocast(ids_BT.device, dtype):
        hidden_BTD = model.hidden(ids_BT, n_loops=n_loops)
        loss = linear_cross_entropy(hidden_BTD, model.head.weight, ids_BT)
    loss.backward()
    weights = [p.grad for p in model.parameters() if p.grad is not None]
    return [loss.detach(), hidden_BTD.detach(), *weights]


def _ids(batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1024, (batch, tokens), generator=generator)
