"""Trajectories of the state over many loops: update norms, distances, contraction rates.

Loop t is the map f_t in h_{t+1} = f_t(h_t). From ``max_loop_iters`` on, the LoRA adapter and the
loop embedding keep their last index, so the map is constant and may have a fixed point.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.checks import check_count, check_number, checked
from open_mythos.errors import ConfigError
from open_mythos.evaluation.frozen import frozen
from open_mythos.model.context import Context
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.trace import LoopTrace

ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Updates below this fraction of the state's norm are rounding error."""


@dataclass(frozen=True)
class Trajectory:
    """States of every loop, h_0 first; all metrics are per token."""

    states_LBTD: Tensor
    """(L + 1, B, T, D) float32: h_0 .. h_L."""
    ctx: Context | None = None
    """Context of the call, for predictions from the states; None for causal sequences whose
    predictions need the states alone."""

    @property
    def n_loops(self) -> int:
        """Number of loops L."""
        return self.states_LBTD.shape[0] - 1

    def updates(self) -> Tensor:
        """Return h_{t+1} - h_t, (L, B, T, D)."""
        return self.states_LBTD.diff(dim=0)

    def change(self) -> Tensor:
        """Return the relative change ||h_{t+1} - h_t|| / ||h_{t+1}|| of each loop, (L, B, T)."""
        return _share(self.updates().norm(dim=-1), self.states_LBTD[1:])

    def acceleration(self) -> Tensor:
        """Return ||(h_{t+1} - h_t) - (h_t - h_{t-1})|| / ||h_{t+1}||, (L - 1, B, T).

        Entry i belongs to loop t = i + 1. Source: arXiv 2509.23314.
        """
        return _share(self.states_LBTD.diff(n=2, dim=0).norm(dim=-1), self.states_LBTD[2:])

    def turning(self) -> Tensor:
        """Return the cosine between consecutive updates, (L - 1, B, T): -1 is a reversal."""
        updates_LBTD = self.updates()
        return torch.cosine_similarity(updates_LBTD[1:], updates_LBTD[:-1], dim=-1)

    def distance(self, point_BTD: Tensor) -> Tensor:
        """Return the relative distance to a point, ||h_t - p|| / ||p||, (L + 1, B, T)."""
        point_BTD = point_BTD.to(self.states_LBTD)
        return _share((self.states_LBTD - point_BTD).norm(dim=-1), point_BTD)

    def contraction(self, skip: int = 0) -> ContractionFit:
        """Fit ||h_{t+1} - h_t|| = c r^t to every token by least squares on the logarithm.

        Args:
            skip: Number of initial loops (the transient) to exclude.

        Raises:
            ConfigError: Fewer than three updates remain.
        """
        check_count("skip", skip, least=0)
        if self.n_loops - skip < 3:
            raise ConfigError(
                "too few updates to fit a rate", where="skip",
                value=f"{self.n_loops} loops - {skip}", allowed="three or more",
                fix="run more loops or skip fewer",
            )  # fmt: skip
        size_LBT = self.updates()[skip:].norm(dim=-1).double()
        floor_LBT = ROUNDING * self.states_LBTD[skip + 1 :].norm(dim=-1)
        # exclude everything after the first update below the floor: later ones may exceed it again
        used_LBT = (size_LBT > floor_LBT).cummin(dim=0).values
        return _fit_geometric(size_LBT, used_LBT)


@dataclass(frozen=True)
class ContractionFit:
    """Geometric decay of each token's updates."""

    rate: Tensor
    """(B, T) ratio r of consecutive update norms. NaN where fewer than three updates exceed
    rounding error."""
    r_squared: Tensor
    """(B, T) fraction of the variance of log ||update|| explained; NaN as above."""
    loops: Tensor
    """(B, T) number of updates fitted."""


@dataclass(frozen=True)
class FixedPoint:
    """Final state of a long run and its fixed-point residual."""

    state_BTD: Tensor
    """State h, float32."""
    residual_BT: Tensor
    """||f(h) - h|| / ||h||. A large residual means a cycle, a drift, or too few loops."""
    loops: int
    """Number of loops that led to this state."""

    def converged(self, tolerance: float = 1e-5) -> Tensor:
        """Return where the residual is at most ``tolerance``, (B, T)."""
        return self.residual_BT <= tolerance


@checked
def run_trajectory(
    model: OpenMythos,
    input_ids: Tensor,
    n_loops: int,
    *,
    h_BTD: Tensor | None = None,
    trace: LoopTrace | None = None,
) -> Trajectory:
    """Run ``n_loops`` loops without coda, head or autograd, and keep every state.

    The states take (n_loops + 1) B T D x 4 bytes on the model's device.

    Args:
        model: The model; it runs in evaluation mode.
        input_ids: (B, T) token ids without padding.
        n_loops: Number of loops; may exceed the trained depth.
        h_BTD: Initial state; the model's own by default.
        trace: Receives diagnostics, such as routing.
    """
    check_count("n_loops", n_loops)
    with frozen(model, torch.float32):
        h_BTD, e_BTD, ctx = _start(model, input_ids, h_BTD)
        loops = model.recurrent.unroll(e_BTD, ctx, n_loops, h_BTD=h_BTD, trace=trace)
        states = [h_BTD.float(), *(state_BTD for _, state_BTD in loops)]
    return Trajectory(torch.stack(states), ctx)


@checked
def fixed_point(
    model: OpenMythos,
    input_ids: Tensor,
    *,
    max_loops: int = 1024,
    tolerance: float = 1e-5,
    h_BTD: Tensor | None = None,
) -> FixedPoint:
    """Search for a fixed point by iterating the loop until no token moves.

    Iteration without acceleration finds attracting fixed points only, which are those the model can
    reach. It runs at least ``max_loop_iters`` loops, after which the map is constant.

    Args:
        model: The model; it runs in evaluation mode.
        input_ids: (B, T) token ids without padding.
        max_loops: Maximum number of loops.
        tolerance: Stop when ||f(h) - h|| / ||h|| of every token is at most this.
        h_BTD: Initial state; the model's own by default.
    """
    check_count("max_loops", max_loops)
    check_number("tolerance", tolerance, ge=0)
    with frozen(model, torch.float32):
        h_BTD, e_BTD, ctx = _start(model, input_ids, h_BTD)
        for t, next_BTD in model.recurrent.unroll(e_BTD, ctx, max_loops, h_BTD=h_BTD):
            residual_BT = _share((next_BTD - h_BTD).norm(dim=-1), h_BTD)
            settled = t >= model.cfg.max_loop_iters - 1 and bool((residual_BT <= tolerance).all())
            if settled or t == max_loops - 1:
                break
            h_BTD = next_BTD
    return FixedPoint(h_BTD.float(), residual_BT, t)


def _start(
    model: OpenMythos, input_ids: Tensor, h_BTD: Tensor | None
) -> tuple[Tensor, Tensor, Context]:
    input_ids = input_ids.to(model.final_norm.weight.device)
    ctx = model.context(input_ids)
    e_BTD = model.embed(input_ids, ctx)
    h_BTD = model.recurrent.initial_state(e_BTD, ctx) if h_BTD is None else h_BTD.to(e_BTD.device)
    return h_BTD, e_BTD, ctx


def _share(length: Tensor, of_D: Tensor) -> Tensor:
    return length / of_D.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)


def _fit_geometric(size_LBT: Tensor, used_LBT: Tensor) -> ContractionFit:
    """Regress log size on the loop index over the used loops, per token."""
    weight = used_LBT.to(size_LBT)
    count = weight.sum(0)
    loop = torch.arange(len(size_LBT)).to(size_LBT).view(-1, 1, 1)
    log_size = torch.where(used_LBT, size_LBT, 1.0).log()
    x = weight * (loop - (weight * loop).sum(0) / count)
    y = weight * (log_size - (weight * log_size).sum(0) / count)
    slope = (x * y).sum(0) / (x * x).sum(0)
    rest, total = ((y - slope * x) ** 2).sum(0), (y * y).sum(0)
    # equal updates fit a line exactly
    r_squared = torch.where(total > 0, 1 - rest / total, 1.0)
    enough = count >= 3
    return ContractionFit(
        torch.where(enough, slope.exp(), torch.nan).float(),
        torch.where(enough, r_squared, torch.nan).float(),
        count.long(),
    )
