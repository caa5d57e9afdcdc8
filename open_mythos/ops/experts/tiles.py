"""Routed experts on a CPU in matmuls of one size: a token's bits do not depend on its batch.

A matmul library picks its kernel, and so the order of summation, by the number of rows. Here every
matmul has :data:`TILE` rows, padded with zeros: a token's result is the same whichever other tokens
chose its experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from open_mythos.ops.experts.rows import Call, activated, read_ends

TILE = 2
"""Rows of a matmul. With few tokens per expert, more rows are more padding."""


def forward(call: Call) -> Tensor:
    """Return the weighted results (N C, D); see :func:`open_mythos.ops.experts.grouped.forward`."""
    x_ND, gate_up_EDF, down_EFD, token, w, ends_E = call
    experts, source = tiles(read_ends(ends_E, len(token)))
    row = torch.tensor([max(0, i) for i in source], dtype=torch.long)
    padding = torch.tensor([[i < 0] for i in source], dtype=torch.bool).view(-1, 1)
    place = torch.tensor([place for place, i in enumerate(source) if i >= 0], dtype=torch.long)
    x = x_ND.index_select(0, token.index_select(0, row)).masked_fill_(padding, 0)
    hidden = activated(_multiply(x, gate_up_EDF, experts), w.index_select(0, row))
    return _multiply(hidden, down_EFD, experts).index_select(0, place)


def tiles(ends: list[int]) -> tuple[list[int], list[int]]:
    """Return the expert of each tile, and the row in each place of all tiles, -1 for padding."""
    experts, source, start = list[int](), list[int](), 0
    for expert, end in enumerate(ends):
        n_tiles = -((start - end) // TILE)
        experts += [expert] * n_tiles
        source += [*range(start, end), *[-1] * (n_tiles * TILE - (end - start))]
        start = end
    return experts, source


def _multiply(x: Tensor, stack_EKM: Tensor, experts: list[int]) -> Tensor:
    """Multiply each tile by the matrix of its expert."""
    y, matrices = x.new_empty(len(x), stack_EKM.shape[2]), stack_EKM.unbind()
    for expert, tile, out in zip(experts, x.split(TILE), y.split(TILE), strict=False):
        torch.mm(tile, matrices[expert], out=out)
    return y
