"""What happens inside the loop, written into an object that the caller owns.

Pass ``trace=LoopTrace()`` to a forward call. Records are keyed by loop (and layer), so writing one
twice, as activation checkpointing does, changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.errors import ConfigError
from open_mythos.model.active import Active

PER_ROW = ("state_norm", "delta_norm", "correlation")
"""Records with an entry per row."""


@dataclass
class LoopTrace:
    """Diagnostics of one forward call.

    Attributes:
        keep_states: Also keep the state after every loop.
        keep_routing: Also keep router scores (with their graph) and the chosen experts.
        keep_correlation: Also measure how alike the states of a row's tokens are.
        state_norm: Loop t -> (rows,) mean over tokens of ||h_{t+1}||.
        delta_norm: Loop t -> (rows,) mean over tokens of ||h_{t+1} - h_t||.
        correlation: Loop t -> (rows,) :func:`token_correlation` of h_{t+1}, if kept.
        active: Loop t -> the rows and positions that were computed; None means all of them.
        exits: (B, T) loops that each position ran, if an exit rule was given.
        load: (layer, loop) -> (E,) tokens that chose each expert, padding not counted.
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

    @property
    def n_loops(self) -> int:
        """Loops recorded."""
        return len(self.state_norm)

    @torch.no_grad()
    def record_state(
        self, loop: int | Tensor, before_BTD: Tensor, after_BTD: Tensor, active: Active | None
    ) -> int:
        """Record what a loop did to the state of what is ``active`` (None: all); return its index.

        Raises:
            ConfigError: ``loop`` is a tensor: rows at different loops have no common record.
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
        """Keep the tensor into which the loop writes how many loops each position ran."""
        self.exits = exits_BT

    def record_routing(
        self, layer: int, loop: int, load_E: Tensor, scores_BTE: Tensor, experts_BTC: Tensor
    ) -> None:
        """Note which experts the tokens of one mixture layer chose."""
        self.load[layer, loop] = load_E.detach()
        if self.keep_routing:
            self.scores[layer, loop] = scores_BTE
            self.experts[layer, loop] = experts_BTC

    def add(self, other: LoopTrace) -> None:
        """Append the rows of another call (:data:`PER_ROW`), and add its expert loads."""
        for name in PER_ROW:
            into, rows = getattr(self, name), getattr(other, name)
            for loop, value_R in rows.items():
                into[loop] = torch.cat([into[loop], value_R]) if loop in into else value_R
        for key, load_E in other.load.items():
            self.load[key] = self.load[key] + load_E if key in self.load else load_E

    def load_by_layer(self) -> dict[int, Tensor]:
        """Layer -> (E,) tokens per expert, summed over all loops."""
        total: dict[int, Tensor] = {}
        for (layer, _), load_E in self.load.items():
            total[layer] = total.get(layer, torch.zeros_like(load_E)) + load_E
        return total

    def load_by_loop(self, layer: int) -> Tensor:
        """(L, E) tokens per expert at each loop of one layer."""
        loops = sorted(loop for (at, loop) in self.load if at == layer)
        return torch.stack([self.load[layer, loop] for loop in loops])

    def routing_entropy(self, layer: int) -> Tensor:
        """(L,) entropy of the expert load at each loop over log E: 1 is even, 0 a single expert."""
        return load_entropy(self.load_by_loop(layer))

    def expert_overlap(self, layer: int) -> Tensor:
        """(L, L) share of experts a token has in common between two loops; needs keep_routing.

        1 means the same set, 0 disjoint sets. Independent routing gives about C / E. Only the rows
        that ran both loops count.
        """
        loops = sorted(loop for (at, loop) in self.experts if at == layer)
        overlap = torch.eye(len(loops))
        for i, later in enumerate(loops):
            for j, earlier in enumerate(loops[:i]):
                before_BTC = self._of_rows(self.experts[layer, earlier], earlier, later)
                same = before_BTC.unsqueeze(-1) == self.experts[layer, later].unsqueeze(-2)
                overlap[i, j] = overlap[j, i] = same.any(-1).float().mean()
        return overlap

    def rows(self, loop: int) -> Tensor | None:
        """Return the (R,) rows that ``loop`` computed, ascending; None for all of them."""
        active = self.active[loop]
        return None if active is None else active.rows

    def _of_rows(self, record: Tensor, earlier: int, later: int) -> Tensor:
        """Return what loop ``earlier`` recorded of the rows that loop ``later`` still ran."""
        ran, run = self.rows(earlier), self.rows(later)
        if run is None:
            return record
        return record[run if ran is None else torch.searchsorted(ran, run)]


def load_entropy(load_LE: Tensor) -> Tensor:
    """(L,) entropy of each row's shares over log E: 1 is even, 0 a single expert (or no token)."""
    share_LE = load_LE / load_LE.sum(-1, keepdim=True).clamp_min(1)
    entropy = -(share_LE * share_LE.clamp_min(1e-12).log()).sum(-1)
    return entropy / torch.log(torch.tensor(float(max(2, load_LE.shape[1]))))


def token_correlation(h_BTD: Tensor, real_BT: Tensor | None = None) -> Tensor:
    """(B,) mean cosine between the states of two different tokens of a row; 0 for a single token.

    1 means that all tokens have become the same direction (collapse, oversmoothing), 0 that they
    have nothing in common. Computed from the sum of the unit vectors, ||sum u||^2 = T + sum of all
    cosines, so it costs T D and not T^2 D.

    Args:
        h_BTD: States.
        real_BT: True at the positions that count; None for all of them.
    """
    unit_BTD = F.normalize(h_BTD.float(), dim=-1)
    if real_BT is not None:
        unit_BTD = unit_BTD * real_BT.unsqueeze(-1)
    # a state of zero has no direction: its own square is 0, not 1
    own_B, pairs_B = unit_BTD.square().sum((1, 2)), unit_BTD.sum(1).square().sum(-1)
    n_B = torch.full_like(own_B, h_BTD.shape[1]) if real_BT is None else real_BT.sum(-1).float()
    return (pairs_B - own_B) / (n_B * (n_B - 1)).clamp_min(1)


def _mean(x_BT: Tensor, real_BT: Tensor | None) -> Tensor:
    """(B,) mean over the real positions."""
    if real_BT is None:
        return x_BT.mean(-1)
    return (x_BT * real_BT).sum(-1) / real_BT.sum(-1).clamp_min(1)
