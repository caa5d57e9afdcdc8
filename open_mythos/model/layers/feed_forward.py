"""Dense feed-forward layers, selected by ``ffn_kind``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.checks import checked

Activation = Callable[[Tensor], Tensor]


class Expert(nn.Module):
    """Gated feed-forward or expert: down(act(gate x) * up x) (arXiv 2002.05202).

    Args:
        dim: Width D of input and output.
        expert_dim: Hidden width F.
        activation: Applied to the gate; SiLU (SwiGLU) by default.
    """

    @checked
    def __init__(self, dim: int, expert_dim: int, activation: Activation = F.silu) -> None:
        super().__init__()
        self.activation = activation
        self.gate_up = nn.Linear(dim, 2 * expert_dim, bias=False)
        self.down = nn.Linear(expert_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)


class SquaredReLU(nn.Module):
    """Feed-forward down(relu(up x)^2) (Primer, arXiv 2109.08668).

    Args:
        dim: Width D of input and output.
        hidden_dim: Hidden width F.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return self.down(F.relu(self.up(x)).square())


FEED_FORWARDS: dict[str, Callable[[int, int], nn.Module]] = {
    "swiglu": Expert,
    "geglu": partial(Expert, activation=partial(F.gelu, approximate="tanh")),
    "relu2": SquaredReLU,
}
"""``ffn_kind`` -> constructor of (dim, hidden width)."""
