"""The mixture of experts in ghost tensors: ``layers/moe.py``, ``ops/experts/operation.py`` and
``train/processes/expert_parallel.py``, line by line, as if all experts had equally many tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from open_mythos.config import MythosConfig
from open_mythos.errors import ConfigError
from open_mythos.plan.layers import FeedForward, Weights
from open_mythos.plan.ops import Ops
from open_mythos.plan.tape import FLOAT32, GRADIENTS, Ghost, Gradients, Saved, Weight

DEFERRED_TOKENS = 256
"""As in ``open_mythos.ops.experts.routed``, which loads torch; a test compares."""
WAITING = 4
"""As in ``open_mythos.ops.experts.looped_stack``."""


class Uses:
    """Operands and results' gradients that wait for a stack of ``n`` elements of ``size`` bytes."""

    def __init__(self, n: int, size: int) -> None:
        self._n, self._size = n, size
        self._left: list[tuple[Ghost, Ghost]] = []
        self._total: Ghost | None = None

    def leave(self, ops: Ops, operand: Ghost, grad: Ghost) -> None:
        """Add one use."""
        self._left.append((operand, grad))
        if sum(x.n + y.n for x, y in self._left) >= WAITING * self._n:
            self._add_up(ops)

    def take(self, ops: Ops) -> Ghost | None:
        """The gradient of all uses."""
        if self._left:
            self._add_up(ops)
        total, self._total = self._total, None
        return total

    def _add_up(self, ops: Ops) -> None:
        taken, self._left = self._left, []
        # on a CPU one buffer, for the rows of one expert, serves all of them: that is little
        joined = _joined(ops, taken) if ops.cuda else []
        gradient = ops.new(self._n, self._size, GRADIENTS)
        self._total = gradient if self._total is None else self._total
        del joined, taken


@dataclass
class Stack:
    """``LoopedStack``: expert weights whose gradient waits for all their uses.

    Attributes:
        weight: The weights as products read them.
        uses: What waits.
    """

    weight: Ghost
    uses: Uses


@dataclass
class Call:
    """What ``Context`` keeps between the loops of one call."""

    copies: dict[tuple[int, bool], Ghost] = field(default_factory=dict)
    stacks: dict[int, Stack] = field(default_factory=dict)


class Mixture:
    """``MoEFFN``, its experts divided over ``processes``.

    Args:
        cfg: The model.
        weights: Of the whole model; stacks of experts hold those of one process.
        name: What the names of this layer's begin with.
        processes: 1 keeps all experts in every process.
    """

    def __init__(self, cfg: MythosConfig, weights: Weights, name: str, processes: int = 1) -> None:
        self.cfg, self.processes = cfg, processes
        self.router = weights[f"{name}.router.weight"]
        self.gate_up, self.down = weights[f"{name}.gate_up"], weights[f"{name}.down"]
        self.local_experts = self.gate_up.shape[0]
        self.shared = FeedForward(weights, f"{name}.shared") if cfg.n_shared_experts else None

    def __call__(self, ops: Ops, x: Ghost, call: Call) -> Ghost:
        """``forward``."""
        x = ops.reshaped(x)
        experts, weights = self._route(ops, x)
        x = ops.low(x)
        y = (
            self._routed(ops, x, experts, weights, *self.stacks(ops, x, call))
            if self.processes == 1
            else self._mix_apart(ops, x, weights)
        )
        if self.shared is not None:
            y = ops.add(y, self.shared(ops, x))
        return ops.reshaped(y)

    def _route(self, ops: Ops, x: Ghost) -> tuple[Ghost, Ghost]:
        """Chosen experts and their weights; the scores are kept by the graph alone."""
        tokens = x.n // self.cfg.dim
        chosen = tokens * self.cfg.n_experts_per_tok
        wide = ops.to(x, FLOAT32)
        scores = ops.unary(ops.product(wide, self.router, self.cfg.n_experts), saves_result=True)
        experts = ops.integers(chosen)
        weights = ops.take(scores, chosen, experts)
        if self.cfg.n_experts_per_tok > 1:
            weights = ops.mul(weights, ops.unary(ops.total(weights, tokens)))
        return experts, weights

    def stacks(self, ops: Ops, x: Ghost, call: Call) -> tuple[Ghost, Ghost, list[Stack]]:
        """``stacks``: weights as products read them; the second time, those of the first.

        With them come the two stacks whose gradients wait for all loops, or none.
        """
        gate_up, down = (_cast(ops, each, call) for each in (self.gate_up, self.down))
        chosen = x.n // self.cfg.dim * self.cfg.n_experts_per_tok
        defers = ops.recording and chosen <= DEFERRED_TOKENS * self.cfg.n_experts
        return gate_up, down, [_looped(ops, w, call) for w in (gate_up, down)] if defers else []

    def _mix_apart(self, ops: Ops, x: Ghost, weights: Ghost) -> Ghost:
        """``_Mix``: rows travel to their experts and back."""
        cfg, chosen = self.cfg, weights.n
        gate_up, down = (_local(ops, each) for each in (self.gate_up, self.down))
        order = ops.integers(chosen)
        rows = _travelled(ops, ops.take(x, chosen * cfg.dim, ops.integers(chosen)))
        rows = ops.cat(rows, ops.new(cfg.dim, rows.size))
        numbers, ones = ops.integers(chosen), ops.new(chosen + 1, FLOAT32)
        made = ops.part(self._routed(ops, rows, numbers, ones, gate_up, down, []), chosen * cfg.dim)
        back = _travelled(ops, made)
        inverse = ops.integers(chosen)
        y = ops.take(back, back.n, inverse)
        y = ops.total(
            ops.mul(y, ops.to(weights, y.size)), chosen // cfg.n_experts_per_tok * cfg.dim
        )
        del order, numbers
        return y

    def _routed(
        self,
        ops: Ops,
        x: Ghost,
        experts: Ghost,
        weights: Ghost,
        gate_up: Ghost,
        down: Ghost,
        stacks: list[Stack],
    ) -> Ghost:
        """``routed_experts``; gradients of the two ``stacks``, if there are any, wait."""
        if self.cfg.moe_backend == "reference":
            raise ConfigError(
                "the plain twin of the experts is not planned for", where="moe_backend",
                value=self.cfg.moe_backend, allowed='"auto", "grouped" or "sorted"',
                fix='set moe_backend to "auto"',
            )  # fmt: skip
        x, weights = ops.to(x, gate_up.size), ops.to(weights, gate_up.size)
        size, chosen, hidden = x.size, weights.n, weights.n * self.cfg.expert_dim
        spread, tokens = chosen * self.cfg.dim, x.n
        # a node keeps alive what it refers to: numbers and lists, no tensors
        waiting, sizes = [stack.uses for stack in stacks], (gate_up.n, down.n)
        order = ops.integers(chosen)
        first = _first_product(ops, chosen, spread, 2 * hidden, size)
        activated = ops.new(hidden, size)
        second = ops.new(spread, size)
        y = _to_tokens(ops, chosen, spread, tokens, size)
        del activated, second

        def apply(grads: Gradients, saved: Saved) -> Gradients:
            number_of_row, row_weights = ops.integers(chosen), ops.new(chosen, size)
            grad = ops.new(spread, size)
            d_hidden, d_first = ops.new(hidden, size), ops.new(2 * hidden, size)
            silu, again, d_weights = (ops.new(n, size) for n in (hidden, hidden, chosen))
            del silu
            d_down = d_gate_up = None
            if waiting:
                waiting[1].leave(ops, again, grad if ops.cuda else ops.new(tokens, size))
            else:
                d_down = ops.new(sizes[1], size, GRADIENTS)
            del d_hidden, again, grad
            rows = ops.new(tokens if waiting and not ops.cuda else spread, size)
            if waiting:
                waiting[0].leave(ops, rows, d_first)
            else:
                d_gate_up = ops.new(sizes[0], size, GRADIENTS)
            del rows
            d_rows = ops.new(spread, size)
            d_x = _to_tokens(ops, chosen, spread, tokens, size)
            del d_rows, d_first, number_of_row, row_weights, d_weights
            return (d_x, ops.new(chosen, size), d_gate_up, d_down)

        through = [stack.weight for stack in stacks] or [gate_up, down]
        kept = (x, weights, *through, experts, first, order)
        ops.record((y,), (x, weights, *through), apply, kept)
        return y


def _first_product(ops: Ops, chosen: int, rows: int, n: int, size: int) -> Ghost:
    """The rows of all choices times gate and up projections."""
    token_of_row, gathered = ops.integers(chosen), ops.new(rows, size)
    product = ops.new(n, size)
    del token_of_row, gathered
    return product


def _cast(ops: Ops, weight: Weight, call: Call) -> Ghost:
    """``Context.cast``: a copy for the loops with gradient, another for those without."""
    if not ops.autocast:
        return weight
    key = id(weight), ops.recording
    if key not in call.copies:
        call.copies[key] = ops.weight_copy(weight)
    return call.copies[key]


def _local(ops: Ops, weight: Weight) -> Ghost:
    """``_local_weights``."""
    here = ops.reshaped(weight)
    return ops.weight_copy(here) if ops.autocast else here


def _travelled(ops: Ops, rows: Ghost) -> Ghost:
    """``_Travel``: as many rows arrive as leave."""
    y, n, size = ops.new(rows.n, rows.size), rows.n, rows.size
    ops.record((y,), (rows,), lambda g, s: (ops.new(n, size),))
    return y


def _to_tokens(ops: Ops, chosen: int, rows: int, n: int, size: int) -> Ghost:
    """The sum of each token's rows."""
    inverse = ops.integers(chosen)
    gathered = ops.new(rows, size) if ops.cuda else ops.integers(2 * chosen)
    out = ops.new(n, size)
    del inverse, gathered
    return out


def _looped(ops: Ops, weight: Ghost, call: Call) -> Stack:
    """``Context.looped``: a stack whose node computes the joint gradient of all uses."""
    if id(weight) in call.stacks:
        return call.stacks[id(weight)]
    uses = Uses(weight.n, weight.size)
    stack = call.stacks[id(weight)] = Stack(weight.view(), uses)
    ops.record((stack.weight,), (weight,), lambda grads, saved: (uses.take(ops),))
    return stack


def _joined(ops: Ops, uses: list[tuple[Ghost, Ghost]]) -> list[Ghost]:
    """Operands, then gradients, of all uses: one after the other, then sorted by expert."""
    joined = []
    for side in (0, 1):
        together = ops.new(sum(use[side].n for use in uses), uses[0][side].size)
        joined.append(ops.new(together.n, together.size))
        del together
    return joined
