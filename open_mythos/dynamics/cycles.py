"""Long-run behavior of each token's state: convergence, cycles, divergence, drift.

Looped models show "orbits" and "sliders" beside fixed points (Huginn, arXiv 2502.05171, section 7).
Only the tail of a trajectory is examined. All thresholds are relative to the root mean square norm
of the token's states in the tail, its *size*.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.checks import check_count, check_number, checked
from open_mythos.dynamics.trajectory import Trajectory
from open_mythos.errors import ConfigError

KINDS = ("converged", "cyclic", "converging", "diverging", "drifting", "wandering")
"""Categories in order of precedence.

- converged: the tail stays within ``tolerance`` of its mean.
- cyclic: the smallest period p (at most half the tail) at which every state stays within
  ``tolerance`` of its phase mean.
- converging: mean update norm in the second half of the tail is at most half that in the first.
- diverging: the norm at least doubles over the tail, or is not finite.
- drifting: a linear trend explains at least 90 % of the tail's variance.
- wandering: none of these.
"""

SHRINKS = 0.5
GROWS = 2.0
STRAIGHT = 0.9
"""Pure drift is 1, a cycle about 0, a high-dimensional random walk 0.6 = 1 - (1/15) / (1/6)."""


@dataclass(frozen=True)
class LongRun:
    """Category of every token and the statistics behind it."""

    kind: Tensor
    """(B, T) int64 index into :data:`KINDS`."""
    period: Tensor
    """(B, T) int64: 1 if converged, p if cyclic, 0 otherwise."""
    spread: Tensor
    """(B, T) largest distance of a state from its phase mean at ``period`` or 1, over the size."""
    shrinkage: Tensor
    """(B, T) mean update norm in the second half of the tail over that in the first."""
    growth: Tensor
    """(B, T) norm of the tail's last state over that of its first."""
    straightness: Tensor
    """(B, T) fraction of the tail's variance explained by a linear trend."""

    def names(self) -> list[list[str]]:
        """Return the category names, (B, T)."""
        return [[KINDS[kind] for kind in row] for row in self.kind.tolist()]

    def counts(self) -> dict[str, int]:
        """Return the number of tokens per category, zeros included."""
        counts = self.kind.flatten().bincount(minlength=len(KINDS)).tolist()
        return dict(zip(KINDS, counts, strict=True))


@checked
def classify(
    path: Trajectory,
    *,
    tail: int | None = None,
    tolerance: float = 1e-2,
    max_period: int | None = None,
) -> LongRun:
    """Classify each token by its last ``tail`` states.

    Args:
        path: A trajectory long enough to exclude the transient.
        tail: Number of states examined; half of them by default.
        tolerance: Distance below which states count as equal, relative to the size.
        max_period: Longest period tried; half the tail by default and at most.

    Raises:
        ConfigError: The tail has fewer than eight states, or exceeds the trajectory.
    """
    check_number("tolerance", tolerance, ge=0)
    states_LBTD = path.states_LBTD
    tail = len(states_LBTD) // 2 if tail is None else tail
    if not 8 <= tail <= len(states_LBTD):
        raise ConfigError(
            "the tail does not fit the trajectory", where="tail", value=tail,
            allowed=f"8 .. {len(states_LBTD)}, the number of states",
            fix="run more loops or pass a shorter tail",
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
    """Return the smallest period within tolerance (0: none) and the spread at it (or at 1)."""
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
    """Return the largest distance from the phase mean, over as many whole periods as fit."""
    whole = len(tail_LBTD) // period * period
    folded = tail_LBTD[-whole:].unflatten(0, (-1, period))
    return (folded - folded.mean(0)).norm(dim=-1).amax((0, 1))


def _straightness(tail_LBTD: Tensor) -> Tensor:
    """Return R^2 (B, T) of the linear regression of the state on time."""
    time_L = torch.linspace(-1, 1, len(tail_LBTD), dtype=torch.float64, device=tail_LBTD.device)
    centered_LBTD = tail_LBTD - tail_LBTD.mean(0)
    slope_BTD = torch.einsum("l,lbtd->btd", time_L, centered_LBTD) / time_L.square().sum()
    explained_BT = slope_BTD.square().sum(-1) * time_L.square().sum()
    return _ratio(explained_BT, centered_LBTD.square().sum(-1).sum(0))


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Divide, with 0 / 0 = 0."""
    return part / whole.clamp_min(torch.finfo(torch.float64).tiny)
