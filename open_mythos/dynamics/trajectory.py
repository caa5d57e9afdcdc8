"""The path of the state over many loops: how far it moves, where it goes, how fast it gets there.

Loop t is the map f_t in h_{t+1} = f_t(h_t). From ``max_loop_iters`` on the adapter and the loop
embedding stay at their last index, so the map no longer changes and may have a fixed point.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.checks import check_count
from open_mythos.errors import ConfigError
from open_mythos.evaluation.frozen import frozen
from open_mythos.model.context import Context
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.trace import LoopTrace

ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Updates below this share of the state's norm are rounding, not movement."""


@dataclass(frozen=True)
class Trajectory:
    """States of every loop and token, h_0 first; the figures are per token."""

    states_LBTD: Tensor
    """(L + 1, B, T, D) float32: h_0 .. h_L."""

    @property
    def n_loops(self) -> int:
        """Loops that were run: L."""
        return self.states_LBTD.shape[0] - 1

    def updates(self) -> Tensor:
        """(L, B, T, D): h_{t+1} - h_t."""
        return self.states_LBTD.diff(dim=0)

    def change(self) -> Tensor:
        """(L, B, T) relative change of each loop: ||h_{t+1} - h_t|| / ||h_{t+1}||."""
        return _share(self.updates().norm(dim=-1), self.states_LBTD[1:])

    def acceleration(self) -> Tensor:
        """(L - 1, B, T) second difference ||(h_{t+1} - h_t) - (h_t - h_{t-1})|| / ||h_{t+1}||.

        Entry i belongs to loop t = i + 1. Source: arXiv 2509.23314.
        """
        return _share(self.states_LBTD.diff(n=2, dim=0).norm(dim=-1), self.states_LBTD[2:])

    def turning(self) -> Tensor:
        """(L - 1, B, T) cosine between one update and the next: 1 straight on, -1 back again."""
        updates_LBTD = self.updates()
        return torch.cosine_similarity(updates_LBTD[1:], updates_LBTD[:-1], dim=-1)

    def distance(self, point_BTD: Tensor) -> Tensor:
        """(L + 1, B, T) distance to a point over the point's norm: ||h_t - p|| / ||p||."""
        point_BTD = point_BTD.to(self.states_LBTD)
        return _share((self.states_LBTD - point_BTD).norm(dim=-1), point_BTD)

    def contraction(self, skip: int = 0) -> ContractionFit:
        """Fit ||h_{t+1} - h_t|| = c r^t to every token by least squares of the logarithm.

        Args:
            skip: Leave out the first loops, where the path is not yet near its end.

        Raises:
            ConfigError: Fewer than three updates are left.
        """
        check_count("skip", skip, least=0)
        if self.n_loops - skip < 3:
            raise ConfigError(
                "too few updates to fit a rate to", where="skip",
                value=f"{self.n_loops} loops - {skip}", allowed="three or more",
                fix="run more loops or skip fewer",
            )  # fmt: skip
        size_LBT = self.updates()[skip:].norm(dim=-1).double()
        floor_LBT = ROUNDING * self.states_LBTD[skip + 1 :].norm(dim=-1)
        # a later update may rise above the rounding again: what follows the first small one is out
        used_LBT = (size_LBT > floor_LBT).cummin(dim=0).values
        return _fit_geometric(size_LBT, used_LBT)


@dataclass(frozen=True)
class ContractionFit:
    """The geometric decay of every token's updates."""

    rate: Tensor
    """(B, T) r: the factor by which one loop shrinks the update; above 1 it grows. NaN where
    fewer than three updates were above rounding."""
    r_squared: Tensor
    """(B, T) share of the variance of log ||update|| that the line explains; NaN as above."""
    loops: Tensor
    """(B, T) updates that were fitted."""


@dataclass(frozen=True)
class FixedPoint:
    """The state that a long run arrived at, and how nearly it is a fixed point."""

    state_BTD: Tensor
    """The state h, float32."""
    residual_BT: Tensor
    """||f(h) - h|| / ||h|| of exactly this state. Where it is large, there is no fixed point here
    (a cycle, a drift) or the run was too short."""
    loops: int
    """Loops run before this state."""

    def converged(self, tolerance: float = 1e-5) -> Tensor:
        """(B, T) boolean: the residual is at most ``tolerance``."""
        return self.residual_BT <= tolerance


def run_trajectory(
    model: OpenMythos,
    input_ids: Tensor,
    n_loops: int,
    *,
    h_BTD: Tensor | None = None,
    trace: LoopTrace | None = None,
) -> Trajectory:
    """Run ``n_loops`` loops in one pass, without coda, head or autograd, and keep every state.

    The states take (n_loops + 1) B T D x 4 bytes, on the model's device.

    Args:
        model: The model; it runs in evaluation mode.
        input_ids: (B, T) token ids, without padding.
        n_loops: Loops; may exceed the trained depth.
        h_BTD: Where to begin; the model's initial state by default.
        trace: A collector of the caller's to record into, such as one that keeps routing; its
            ``keep_states`` is set. A new one by default.
    """
    check_count("n_loops", n_loops)
    trace = LoopTrace() if trace is None else trace
    trace.keep_states = True
    with frozen(model, torch.float32):
        h_BTD, e_BTD, ctx = _start(model, input_ids, h_BTD)
        loops = model.recurrent.unroll(e_BTD, ctx, n_loops, h_BTD=h_BTD, trace=trace)
        states = [h_BTD.float(), *(state_BTD for _, state_BTD in loops)]
    return Trajectory(torch.stack(states))


def fixed_point(
    model: OpenMythos,
    input_ids: Tensor,
    *,
    max_loops: int = 1024,
    tolerance: float = 1e-5,
    h_BTD: Tensor | None = None,
) -> FixedPoint:
    """Look for a fixed point by looping on until no token moves, at most ``max_loops`` times.

    Plain iteration, no acceleration: it finds only fixed points that attract, which are those the
    model itself can reach. It does not stop before loop ``max_loop_iters``, from which on the map
    no longer changes.

    Args:
        model: The model; it runs in evaluation mode.
        input_ids: (B, T) token ids, without padding.
        max_loops: Most loops.
        tolerance: Stop when ||f(h) - h|| / ||h|| of every token is at most this.
        h_BTD: Where to begin; the model's initial state by default.
    """
    check_count("max_loops", max_loops)
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
    """Return the first state, the encoded input and the context."""
    input_ids = input_ids.to(model.head.weight.device)
    ctx = model.context(input_ids)
    e_BTD = model.embed(input_ids, ctx)
    h_BTD = model.recurrent.initial_state(e_BTD, ctx) if h_BTD is None else h_BTD.to(e_BTD.device)
    return h_BTD, e_BTD, ctx


def _share(length: Tensor, of_D: Tensor) -> Tensor:
    return length / of_D.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)


def _fit_geometric(size_LBT: Tensor, used_LBT: Tensor) -> ContractionFit:
    """The line through log size over the loops in use, for every token."""
    weight = used_LBT.to(size_LBT)
    count = weight.sum(0)
    loop = torch.arange(len(size_LBT), dtype=size_LBT.dtype, device=size_LBT.device)
    loop = loop.view(-1, 1, 1)
    log_size = torch.where(used_LBT, size_LBT, 1.0).log()
    x = weight * (loop - (weight * loop).sum(0) / count)
    y = weight * (log_size - (weight * log_size).sum(0) / count)
    slope = (x * y).sum(0) / (x * x).sum(0)
    rest, total = ((y - slope * x) ** 2).sum(0), (y * y).sum(0)
    # updates of equal size lie on a line exactly
    r_squared = torch.where(total > 0, 1 - rest / total, 1.0)
    enough = count >= 3
    return ContractionFit(
        torch.where(enough, slope.exp(), torch.nan).float(),
        torch.where(enough, r_squared, torch.nan).float(),
        count.long(),
    )
