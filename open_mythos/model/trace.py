"""Diagnostics of the loop, recorded into an object that the caller owns.

Pass ``trace=LoopTrace()`` to a forward call. Records are keyed by loop (and layer), so recording
twice, as activation checkpointing does, is idempotent.
"""

from __future__ import annotations

from copy import copy, deepcopy
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.checks import check_fields
from open_mythos.errors import ConfigError
from open_mythos.model.active import Active

PER_ROW = ("state_norm", "delta_norm", "correlation")
"""Records with one entry per row."""


@dataclass
class LoopTrace:
    """Diagnostics of one forward call.

    Attributes:
        keep_states: Also keep the state after every loop.
        keep_routing: Also keep router scores (with their graph) and the chosen experts.
        keep_correlation: Also measure the similarity of a row's token states.
        state_norm: Loop t -> (rows,) mean over tokens of ||h_{t+1}||.
        delta_norm: Loop t -> (rows,) mean over tokens of ||h_{t+1} - h_t||.
        correlation: Loop t -> (rows,) :func:`token_correlation` of h_{t+1}, if kept.
        active: Loop t -> computed rows and positions; None for all.
        exits: (B, T) loops of each position, written by the loop if an exit rule is used.
        load: (layer, loop) -> (E,) tokens routed to each expert, excluding padding.
        scores: (layer, loop) -> (rows, T, E) router scores, if kept.
        experts: (layer, loop) -> (rows, T, C) chosen experts, if kept.
        states: Loop t -> (rows, T, D) state after the loop, if kept.
        halting: Loop t -> (rows, T) halting probability of the gate, if states are kept.
    """

    keep_states: bool = False
    keep_routing: bool = False
    keep_correlation: bool = False
    state_norm: dict[int, Tensor] = field(default_factory=dict)
    delta_norm: dict[int, Tensor] = field(default_factory=dict)
    correlation: dict[int, Tensor] = field(default_factory=dict)
    active: dict[int, Active | None] = field(default_factory=dict)
    exits: Tensor | None = None
    load: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    scores: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    experts: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)
    halting: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields("", self)

    def __deepcopy__(self, memo: dict[int, Any]) -> LoopTrace:
        """Copy the values; the copy of router scores has no graph."""
        plain = copy(self)
        for name in ("scores", "halting"):
            setattr(plain, name, {key: x.detach() for key, x in getattr(self, name).items()})
        return LoopTrace(**{x.name: deepcopy(getattr(plain, x.name), memo) for x in fields(self)})

    @property
    def n_loops(self) -> int:
        """Number of loops recorded."""
        return len(self.state_norm)

    @torch.no_grad()
    def record_state(
        self, loop: int | Tensor, before_BTD: Tensor, after_BTD: Tensor, active: Active | None
    ) -> int:
        """Record the state update of the ``active`` positions (None: all); return the loop index.

        Raises:
            ConfigError: ``loop`` is a tensor, which per-loop records do not support.
        """
        if isinstance(loop, Tensor):
            raise ConfigError(
                "a trace cannot record rows at different loops", where="trace",
                value="a loop index per row", allowed="an integer loop index, or trace=None",
            )  # fmt: skip
        after = after_BTD.detach().float()
        change = after - before_BTD.detach().float()
        real = None if active is None else active.real
        self.state_norm[loop] = _mean(after.norm(dim=-1), real)
        self.delta_norm[loop] = _mean(change.norm(dim=-1), real)
        self.active[loop] = active
        if self.keep_correlation:
            self.correlation[loop] = token_correlation(after, real)
        if self.keep_states:
            self.states[loop] = after_BTD.detach()
        return loop

    def record_exits(self, exits_BT: Tensor) -> None:
        """Keep the tensor into which the loop writes the loops of each position."""
        self.exits = exits_BT

    def record_routing(
        self, layer: int, loop: int, load_E: Tensor, scores_BTE: Tensor, experts_BTC: Tensor
    ) -> None:
        """Record the routing of one mixture layer."""
        self.load[layer, loop] = load_E.detach()
        if self.keep_routing:
            self.scores[layer, loop] = scores_BTE
            self.experts[layer, loop] = experts_BTC

    def add(self, other: LoopTrace) -> None:
        """Append the rows of another call (:data:`PER_ROW`) and add its expert loads."""
        for name in PER_ROW:
            into, rows = getattr(self, name), getattr(other, name)
            for loop, value_R in rows.items():
                into[loop] = torch.cat([into[loop], value_R]) if loop in into else value_R
        for key, load_E in other.load.items():
            self.load[key] = self.load[key] + load_E if key in self.load else load_E

    def load_by_layer(self) -> dict[int, Tensor]:
        """Return layer -> (E,) tokens per expert, summed over loops."""
        total: dict[int, Tensor] = {}
        for (layer, _), load_E in self.load.items():
            total[layer] = total.get(layer, torch.zeros_like(load_E)) + load_E
        return total

    def load_by_loop(self, layer: int) -> Tensor:
        """Return the tokens per expert at each loop of a layer, (L, E)."""
        loops = sorted(loop for (at, loop) in self.load if at == layer)
        return torch.stack([self.load[layer, loop] for loop in loops])

    def routing_entropy(self, layer: int) -> Tensor:
        """Return the :func:`load_entropy` of a layer at each loop, (L,)."""
        return load_entropy(self.load_by_loop(layer))

    def expert_overlap(self, layer: int) -> Tensor:
        """Return the fraction of a token's experts shared by two loops, (L, L).

        1 means equal sets, 0 disjoint ones, C / E independent routing. Averages over the rows that
        ran both loops; requires ``keep_routing``.
        """
        loops = sorted(loop for (at, loop) in self.experts if at == layer)
        overlap = torch.eye(len(loops))
        for i, later in enumerate(loops):
            for j, earlier in enumerate(loops[:i]):
                before_BTC = self.experts[layer, earlier]
                ran, run = self.rows(earlier), self.rows(later)
                if run is not None:
                    before_BTC = before_BTC[run if ran is None else torch.searchsorted(ran, run)]
                same = before_BTC.unsqueeze(-1) == self.experts[layer, later].unsqueeze(-2)
                overlap[i, j] = overlap[j, i] = same.any(-1).float().mean()
        return overlap

    def rows(self, loop: int) -> Tensor | None:
        """Return the (R,) rows that ``loop`` computed, ascending; None for all."""
        active = self.active[loop]
        return None if active is None else active.rows


def load_entropy(load_LE: Tensor) -> Tensor:
    """Return the entropy of each load over log E, (L,): 1 is even, 0 a single expert (or none)."""
    share_LE = load_LE / load_LE.sum(-1, keepdim=True).clamp_min(1)
    entropy = -(share_LE * share_LE.clamp_min(1e-12).log()).sum(-1)
    return entropy / torch.log(torch.tensor(float(max(2, load_LE.shape[1]))))


def token_correlation(h_BTD: Tensor, real_BT: Tensor | None = None) -> Tensor:
    """Return the mean cosine between the states of distinct tokens, (B,); 0 for a single token.

    1 means that all tokens are parallel (representation collapse, oversmoothing). Costs T D, not
    T^2 D, by ||sum u||^2 = T + sum of all cosines for unit vectors u.

    Args:
        h_BTD: States.
        real_BT: True at the positions to include; None for all.
    """
    unit_BTD = F.normalize(h_BTD.float(), dim=-1)
    if real_BT is not None:
        unit_BTD = unit_BTD * real_BT.unsqueeze(-1)
    # the unit vector of a zero state is zero: its square is 0, not 1
    own_B, pairs_B = unit_BTD.square().sum((1, 2)), unit_BTD.sum(1).square().sum(-1)
    n_B = torch.full_like(own_B, h_BTD.shape[1]) if real_BT is None else real_BT.sum(-1).float()
    return (pairs_B - own_B) / (n_B * (n_B - 1)).clamp_min(1)


def _mean(x_BT: Tensor, real_BT: Tensor | None) -> Tensor:
    """Average over the real positions, (B,)."""
    if real_BT is None:
        return x_BT.mean(-1)
    return (x_BT * real_BT).sum(-1) / real_BT.sum(-1).clamp_min(1)
