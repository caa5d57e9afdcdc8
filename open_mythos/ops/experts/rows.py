"""Operations around the matmuls of routed experts: sorting, counting, activation, summation."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.devices import in_dry_run, kernel_device


class Call(NamedTuple):
    """Operands of routed experts; the rows are the N tokens' choices, sorted by expert."""

    x_ND: Tensor
    gate_up_EDF: Tensor
    """(E, D, 2F)."""
    down_EFD: Tensor
    token: Tensor
    """(N C,) index of each row's token."""
    w: Tensor
    """(N C, 1) weight of each row."""
    ends_E: Tensor
    """End of each expert's rows."""


def expert_load(experts_NC: Tensor, n_experts: int, valid_N: Tensor | None = None) -> Tensor:
    """Count the tokens that chose each expert, without padding; returns (E,) float32.

    Uses a scatter: ``bincount`` needs a host-device sync for its output size.
    """
    ones = torch.ones(experts_NC.shape, device=experts_NC.device)
    if valid_N is not None:
        ones = ones * valid_N.unsqueeze(-1)
    load = torch.zeros(n_experts, device=experts_NC.device)
    return load.scatter_add_(0, experts_NC.reshape(-1), ones.reshape(-1))


def sort_choices(experts_NC: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """Return (N C,) choices in expert order, and (E,) int32 the end of each expert's choices."""
    ends_E = expert_load(experts_NC, n_experts).cumsum(0).to(torch.int32)
    return experts_NC.flatten().argsort(stable=True), ends_E


def read_counts(counts: Tensor, total: int) -> list[int]:
    """Return the integers in ``counts`` as a list: a host-device sync.

    In a dry run they are an even load of ``total``.
    """
    if in_dry_run(counts):
        n = len(counts)
        return [total * (i + 1) // n - total * i // n for i in range(n)]
    return counts.tolist()


def read_ends(ends_E: Tensor, total: int) -> list[int]:
    """Return the end of each expert's rows, of ``total`` rows in all; see :func:`read_counts`."""
    if in_dry_run(ends_E):
        return [total * (i + 1) // len(ends_E) for i in range(len(ends_E))]
    return ends_E.tolist()


def activated(gate_up: Tensor, w: Tensor) -> Tensor:
    """Compute silu(gate) * up * w."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up).mul_(w)


def activated_backward(
    d_hidden: Tensor, gate_up: Tensor, w: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Recompute the result of :func:`activated`, and its operands' gradients.

    Overwrites ``d_hidden``.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    d_gate_up, silu = torch.empty_like(gate_up), F.silu(gate)
    d_gate, d_up = d_gate_up.chunk(2, dim=-1)
    hidden = silu * up
    torch.mul(d_hidden, hidden, out=d_up)
    d_w = d_up.sum(dim=-1, keepdim=True)
    hidden.mul_(w)
    torch.mul(d_hidden.mul_(w), silu, out=d_up)
    torch.ops.aten.silu_backward.grad_input(d_hidden.mul_(up), gate, grad_input=d_gate)
    return hidden, d_gate_up, d_w


def padded(count: int) -> int:
    """Round ``count`` up to one of few sizes, so that matmuls have few shapes.

    Multiples of 32; above 256, steps of at most an eighth.
    """
    step = max(32, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


def to_tokens(y: Tensor, order: Tensor, top_k: int) -> Tensor:
    """Sum each token's rows: (N C, D) in expert order to (N, D).

    Gathers instead of scattering, so that no atomic additions make results depend on thread order.
    """
    inverse = torch.empty_like(order).scatter_(
        0, order, torch.arange(len(order), device=order.device)
    )
    if kernel_device(y) == "cpu" and len(order):
        # the same in one pass; ten times as fast
        return F.embedding_bag(inverse.view(-1, top_k), y, mode="sum")
    return y.index_select(0, inverse).view(-1, top_k, y.shape[-1]).sum(1)
