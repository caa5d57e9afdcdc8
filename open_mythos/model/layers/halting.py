"""Adaptive halting: the gate and the distributions over loops derived from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from open_mythos.checks import check_number, checked
from open_mythos.devices import is_readable
from open_mythos.errors import ConfigError
from open_mythos.model.layers.float32 import in_float32


class ACTHalting(nn.Module):
    """Halting gate per position and loop, lambda_t = sigmoid(w h + b), in float32.

    Usable in any looped model. It is trained on frozen trajectories; whether mixing the loops by
    its weights in training preserves depth extrapolation is contested.

    Args:
        dim: Width D of the state.
        threshold: Cumulative probability at which a position halts.
    """

    @checked
    def __init__(self, dim: int, threshold: float = 0.99) -> None:
        super().__init__()
        check_number("threshold", threshold, gt=0, le=1)
        self.threshold = threshold
        self.gate = nn.Linear(dim, 1)

    def forward(self, h_BTD: Tensor) -> Tensor:
        """Return the probability (...) of halting at states (..., D), given no earlier halt."""
        return in_float32(self.gate, h_BTD).squeeze(-1).sigmoid()

    def exit_loops(self, lambda_L: Tensor, depth: Tensor | None = None) -> Tensor:
        """Return the loop index after which each position halts: see :func:`exit_loops`."""
        return exit_loops(lambda_L, self.threshold, depth)


def halting_weights(lambda_L: Tensor, depth: Tensor | None = None) -> Tensor:
    """Return the probability of halting at each loop (hazard form).

    p_t = lambda_t prod_{s<t} (1 - lambda_s); the last loop takes the remainder, so the weights of
    every position sum to 1.

    Args:
        lambda_L: (L, ...) gate outputs in [0, 1].
        depth: Loops of each position, broadcastable to (...); L by default.

    Returns:
        (L, ...), float64 or float32: non-negative, zero from ``depth`` on.
    """
    lam = _with_remainder(lambda_L, depth)
    survive = torch.cat((torch.ones_like(lam[:1]), (1 - lam[:-1]).cumprod(0)))
    return lam * survive


def graves_weights(
    lambda_L: Tensor, threshold: float = 0.99, depth: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the mixture weights and ponder cost of Adaptive Computation Time.

    Source: Graves, arXiv 1603.08983, section 2. A position halts at the first loop at which its
    probabilities add up to ``threshold``; that loop takes the remainder.

    Returns:
        (L, ...) weights and the (...) ponder cost, loops run plus remainder.
    """
    lam = _with_remainder(lambda_L, depth)
    total = lam.cumsum(0)
    before = torch.cat((torch.zeros_like(lam[:1]), total[:-1]))
    running = before < threshold
    halts = running & (total >= threshold)
    remainder = (1 - before).clamp_min(0)
    weights = torch.where(halts, remainder, torch.where(running, lam, 0))
    return weights, running.sum(0) + torch.where(halts, remainder, 0).sum(0)


def exit_loops(lambda_L: Tensor, threshold: float, depth: Tensor | None = None) -> Tensor:
    """Return the (...) first loop whose cumulative halting probability reaches ``threshold``."""
    reached = halting_weights(lambda_L, depth).cumsum(0) >= threshold
    first = reached.to(torch.int8).argmax(0)
    return torch.where(reached.any(0), first, _last_loop(lambda_L, depth).expand_as(first))


def _last_loop(lambda_L: Tensor, depth: Tensor | int | None) -> Tensor:
    most = lambda_L.shape[0]
    loops = torch.as_tensor(most if depth is None else depth, device=lambda_L.device)
    if is_readable(loops) and not ((loops >= 1) & (loops <= most)).all():
        raise ConfigError(
            "there are no probabilities for that many loops", where="depth", value=depth,
            allowed=f"1 .. {most}, the loops of the probabilities",
            fix="pass the probabilities of all loops, or a smaller depth",
        )  # fmt: skip
    return loops - 1


def _with_remainder(lambda_L: Tensor, depth: Tensor | None) -> Tensor:
    """Set the probabilities to 1 at the last loop of every position, and to 0 after it."""
    lam = lambda_L if lambda_L.dtype == torch.float64 else lambda_L.float()
    loops = torch.arange(lam.shape[0], device=lam.device).view(-1, *[1] * (lam.dim() - 1))
    last = _last_loop(lam, depth)
    return torch.where(loops == last, 1, torch.where(loops > last, 0, lam))
