"""What each token does in the long run: rest, go round, move off, or none of these.

Looped models do all of it: "orbits" and "sliders" beside fixed points (Huginn, arXiv 2502.05171,
section 7). Only the tail of a trajectory is looked at. Everything is relative to the root mean
square norm of the token's states in the tail, its *size*.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.checks import check_count
from open_mythos.dynamics.trajectory import Trajectory
from open_mythos.errors import ConfigError

KINDS = ("converged", "cyclic", "converging", "diverging", "drifting", "wandering")
"""In the order of the tests: the first that holds decides.

- converged: the tail stays within ``tolerance`` of its mean.
- cyclic: folded by some period p, with at least two periods in the tail, every state stays within
  ``tolerance`` of the mean of its phase; p is the smallest such period.
- converging: updates in the second half of the tail are at most half as long as in the first.
- diverging: the norm at least doubles over the tail, or is not finite.
- drifting: a straight line in time explains at least 90 % of the tail's variance.
- wandering: none of these.
"""

SHRINKS = 0.5
GROWS = 2.0
STRAIGHT = 0.9
"""Pure drift has 1, a cycle near 0, a random walk in many dimensions 0.6 (1 - (1/15) / (1/6))."""


@dataclass(frozen=True)
class LongRun:
    """The verdict on every token, with the figures it rests on."""

    kind: Tensor
    """(B, T) int64, an index into :data:`KINDS`."""
    period: Tensor
    """(B, T) int64: 1 where converged, p where cyclic, 0 elsewhere."""
    spread: Tensor
    """(B, T) largest distance of a state from the mean of its phase over the size, folded by
    ``period`` (by 1 where there is none)."""
    shrinkage: Tensor
    """(B, T) mean length of the updates in the tail's second half over that in its first."""
    growth: Tensor
    """(B, T) norm of the last state over that of the tail's first."""
    straightness: Tensor
    """(B, T) share of the tail's variance that a straight line in time explains."""

    def names(self) -> list[list[str]]:
        """(B, T) the verdicts by name."""
        return [[KINDS[kind] for kind in row] for row in self.kind.tolist()]

    def counts(self) -> dict[str, int]:
        """Verdict -> number of tokens, every verdict listed."""
        found = Counter(name for row in self.names() for name in row)
        return {name: found[name] for name in KINDS}


def classify(
    path: Trajectory,
    *,
    tail: int | None = None,
    tolerance: float = 1e-2,
    max_period: int | None = None,
) -> LongRun:
    """Say of every token what it does in the last ``tail`` states.

    Args:
        path: Long enough that the beginning is over.
        tail: States looked at; half of them by default.
        tolerance: What counts as the same place, relative to the size.
        max_period: Longest period tried; half of the tail by default, and at most that.

    Raises:
        ConfigError: The tail has fewer than eight states, or is longer than the trajectory.
    """
    states_LBTD = path.states_LBTD
    tail = len(states_LBTD) // 2 if tail is None else tail
    if not 8 <= tail <= len(states_LBTD):
        raise ConfigError(
            "no tail to look at", where="tail", value=tail,
            allowed=f"8 .. {len(states_LBTD)}, the states of the trajectory",
            fix="run more loops, or name a shorter tail",
        )  # fmt: skip
    longest = min(tail // 2, check_count("max_period", max_period or tail // 2))
    tail_LBTD = states_LBTD[-tail:].double()
    finite_BT = tail_LBTD.isfinite().all(-1).all(0)
    tail_LBTD = torch.where(finite_BT.unsqueeze(-1), tail_LBTD, 0.0)
    size_BT = tail_LBTD.square().sum(-1).mean(0).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    period_BT, spread_BT = _period(tail_LBTD / size_BT.unsqueeze(-1), longest, tolerance)
    step_LBT = tail_LBTD.diff(dim=0).norm(dim=-1)
    early_BT, late_BT = (half.mean(0) for half in (step_LBT[: tail // 2], step_LBT[tail // 2 :]))
    norm_LBT = tail_LBTD.norm(dim=-1)
    shrinkage_BT = _ratio(late_BT, early_BT)
    growth_BT = torch.where(finite_BT, _ratio(norm_LBT[-1], norm_LBT[0]), torch.inf)
    straight_BT = _straightness(tail_LBTD)
    holds = torch.stack((
        finite_BT & (period_BT == 1), finite_BT & (period_BT > 1),
        finite_BT & (shrinkage_BT <= SHRINKS), growth_BT >= GROWS, straight_BT >= STRAIGHT,
        torch.ones_like(finite_BT),
    ))  # fmt: skip
    return LongRun(
        kind=holds.int().argmax(0),
        period=torch.where(finite_BT, period_BT, 0),
        spread=spread_BT.float(),
        shrinkage=shrinkage_BT.float(),
        growth=growth_BT.float(),
        straightness=straight_BT.float(),
    )


def _period(tail_LBTD: Tensor, longest: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """The smallest period within tolerance (0: none), and the spread folded by it (or by 1)."""
    spread_BT = _folded_spread(tail_LBTD, 1)
    period_BT = (spread_BT <= tolerance).long()
    for period in range(2, longest + 1):
        open_BT = period_BT == 0
        if not open_BT.any():
            break
        folded = _folded_spread(tail_LBTD[:, open_BT], period)
        found = folded <= tolerance
        period_BT[open_BT] = torch.where(found, period, 0)
        spread_BT[open_BT] = torch.where(found, folded, spread_BT[open_BT])
    return period_BT, spread_BT


def _folded_spread(tail_LBTD: Tensor, period: int) -> Tensor:
    """(...) largest distance from the mean of the phase, over as many whole periods as fit."""
    whole = len(tail_LBTD) // period * period
    folded = tail_LBTD[-whole:].unflatten(0, (-1, period))
    return (folded - folded.mean(0)).norm(dim=-1).amax((0, 1))


def _straightness(tail_LBTD: Tensor) -> Tensor:
    """(B, T) R^2 of the regression of the state on time."""
    time_L = torch.linspace(-1, 1, len(tail_LBTD), dtype=torch.float64, device=tail_LBTD.device)
    centred_LBTD = tail_LBTD - tail_LBTD.mean(0)
    slope_BTD = torch.einsum("l,lbtd->btd", time_L, centred_LBTD) / time_L.square().sum()
    explained_BT = slope_BTD.square().sum(-1) * time_L.square().sum()
    return _ratio(explained_BT, centred_LBTD.square().sum(-1).sum(0))


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """0 / 0 is 0."""
    return part / whole.clamp_min(torch.finfo(torch.float64).tiny)
