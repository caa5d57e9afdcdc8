"""The SwiGLU feed-forward."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Expert(nn.Module):
    """down(silu(gate x) * up x) (arXiv 2002.05202): a dense feed-forward or one expert.

    Args:
        dim: Width D of input and output.
        expert_dim: Hidden width F.
    """

    def __init__(self, dim: int, expert_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * expert_dim, bias=False)
        self.down = nn.Linear(expert_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
