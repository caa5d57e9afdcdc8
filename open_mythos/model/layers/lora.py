"""A small adapter that belongs to one loop depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LoRAAdapter(nn.Module):
    """up_t(down_t(x)): the only weights that differ between loops (arXiv 2410.20672).

    ``up`` starts at zero, so that all loops start alike. Past ``max_loops`` the last depth is used.

    Args:
        dim: Width D.
        rank: Rank r.
        max_loops: Number of depths with weights of their own.
    """

    def __init__(self, dim: int, rank: int, max_loops: int) -> None:
        super().__init__()
        self.max_loops = max_loops
        self.down = nn.Parameter(torch.randn(max_loops, dim, rank) * dim**-0.5)
        self.up = nn.Parameter(torch.zeros(max_loops, rank, dim))

    def forward(self, x: Tensor, loop_t: int | Tensor) -> Tensor:
        """(..., D) -> (..., D) with the weights of loop ``loop_t``.

        Args:
            x: Input; (B, T, D) where the loop is a tensor.
            loop_t: The loop of all rows, or (B,) int64, one per row ((1,) for all of them): a
                number that only the device knows.
        """
        last = self.max_loops - 1
        depth = loop_t.clamp(max=last) if isinstance(loop_t, Tensor) else min(loop_t, last)
        return (x @ self.down[depth]) @ self.up[depth]
