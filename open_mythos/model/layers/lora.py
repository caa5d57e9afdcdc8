"""Low-rank adapters, one per loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from open_mythos.checks import checked


class LoRAAdapter(nn.Module):
    """Per-loop low-rank adapter up_t(down_t(x)) (arXiv 2410.20672).

    ``up`` is zero-initialized, so that all loops start alike.

    Args:
        dim: Width D.
        rank: Rank r.
        max_loops: Number of adapters; later loops use the last one.
    """

    @checked
    def __init__(self, dim: int, rank: int, max_loops: int) -> None:
        super().__init__()
        self.max_loops = max_loops
        self.down = nn.Parameter(torch.randn(max_loops, dim, rank) * dim**-0.5)
        self.up = nn.Parameter(torch.zeros(max_loops, rank, dim))

    def forward(self, x: Tensor, loop_t: int | Tensor) -> Tensor:
        """Apply the adapter of loop ``loop_t``, (..., D) -> (..., D).

        Args:
            x: Input; (B, T, D) with a tensor ``loop_t``.
            loop_t: Loop index, or an int64 tensor of them, (B,) or (1,).
        """
        t = capped(loop_t, self.max_loops)
        return (x @ self.down[t]) @ self.up[t]


def capped(t: int | Tensor, n_loops: int) -> int | Tensor:
    """Cap the loop index ``t`` at the last of ``n_loops`` trained loops."""
    return t.clamp(max=n_loops - 1) if isinstance(t, Tensor) else min(t, n_loops - 1)
