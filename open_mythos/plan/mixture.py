"""The mixture of experts in ghost tensors: ``layers/moe.py``, ``ops/moe.py`` and
``train/processes/expert_parallel.py``, line by line, as if all experts had equally many tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from open_mythos.config import MythosConfig
from open_mythos.errors import ConfigError
from open_mythos.plan.layers import FeedForward, Weights
from open_mythos.plan.ops import Ops
from open_mythos.plan.tape import FLOAT32, GRADIENTS, Ghost, Gradients, Saved, Weight

DEFERRED_TOKENS = 192
"""As in ``open_mythos.ops.moe``, which loads torch; a test compares."""


@dataclass
class Stack:
    """``LoopedStack``: expert weights whose gradient waits for all their uses.

    Attributes:
        weight: The weights as products read them.
        uses: Operand and result's gradient of each use, kept until the last.
    """

    weight: Ghost
    uses: list[tuple[Ghost, Ghost]] = field(default_factory=list)


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
        y = (
            self._mix(ops, x, weights, call)
            if self.processes == 1
            else self._mix_apart(ops, x, weights)
        )
        if self.shared is not None:
            y = ops.add(y, self.shared(ops, x))
        del experts
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

    def _mix(self, ops: Ops, x: Ghost, weights: Ghost, call: Call) -> Ghost:
        """``mix``: all experts are here."""
        gate_up, down = (_cast(ops, each, call) for each in (self.gate_up, self.down))
        defers = ops.recording and weights.n <= DEFERRED_TOKENS * self.cfg.n_experts
        return self._routed(ops, x, weights, gate_up, down, call if defers else None)

    def _mix_apart(self, ops: Ops, x: Ghost, weights: Ghost) -> Ghost:
        """``_Mix``: rows travel to their experts and back."""
        cfg, chosen = self.cfg, weights.n
        gate_up, down = (_local(ops, each) for each in (self.gate_up, self.down))
        order = ops.integers(chosen)
        rows = _travelled(ops, ops.take(x, chosen * cfg.dim, ops.integers(chosen)))
        rows = ops.cat(rows, ops.new(cfg.dim, rows.size))
        numbers, ones = ops.integers(chosen), ops.new(chosen + 1, FLOAT32)
        made = ops.part(
            self._routed(ops, rows, ones, gate_up, down, None, top_k=1), chosen * cfg.dim
        )
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
        weights: Ghost,
        gate_up: Ghost,
        down: Ghost,
        call: Call | None,
        top_k: int = 0,
    ) -> Ghost:
        """``routed_experts``; the stacks' gradients wait for all loops if there is a ``call``."""
        cfg = self.cfg
        x, weights = ops.to(x, gate_up.size), ops.to(weights, gate_up.size)
        order, inverse = ops.integers(weights.n), ops.integers(weights.n)
        rows = _to_experts(ops, x, cfg.dim, order, inverse)
        row_weights = _to_experts(ops, weights, 1, order, inverse)
        if _backend(cfg, gate_up.size) == "sorted":
            y = self._sorted(ops, rows, row_weights, gate_up, down)
        else:
            hidden = self._product(ops, rows, gate_up, 2 * cfg.expert_dim, call)
            hidden = ops.mul(ops.swiglu(hidden), row_weights)
            y = self._product(ops, hidden, down, cfg.dim, call)
        return _to_tokens(ops, y, top_k or cfg.n_experts_per_tok, order, inverse)

    def _product(self, ops: Ops, x: Ghost, stack: Ghost, width: int, call: Call | None) -> Ghost:
        """``_product`` of rows with the stack, whose results are ``width`` wide."""
        if call is None:
            return ops.product(x, stack, width, self.local_experts)
        if id(stack) not in call.stacks:
            call.stacks[id(stack)] = _looped(ops, stack)
        rows = x.n * self.local_experts * width // stack.n
        return _deferred(ops, x, call.stacks[id(stack)], rows * width)

    def _sorted(self, ops: Ops, x: Ghost, weights: Ghost, gate_up: Ghost, down: Ghost) -> Ghost:
        """``_sorted``: one dense product for each expert."""
        cfg, n = self.cfg, self.local_experts
        counts = [weights.n * (i + 1) // n - weights.n * i // n for i in range(n)]
        rows, row_weights = (
            ops.split(x, *(c * cfg.dim for c in counts)),
            ops.split(weights, *counts),
        )
        gate_ups = ops.split(gate_up, *[gate_up.n // n] * n, label=GRADIENTS)
        downs = ops.split(down, *[down.n // n] * n, label=GRADIENTS)
        parts = []
        for i in range(n):
            hidden = ops.swiglu(ops.product(rows[i], gate_ups[i], 2 * cfg.expert_dim))
            parts.append(ops.product(ops.mul(hidden, row_weights[i]), downs[i], cfg.dim))
        return ops.cat(*parts)


def _backend(cfg: MythosConfig, size: int) -> str:
    """The kernel that "auto" stands for: grouped products need rows of 16 bytes."""
    if cfg.moe_backend == "reference":
        raise ConfigError(
            "the plain twin of the experts is not planned for", where="moe_backend",
            value=cfg.moe_backend, allowed='"auto", "grouped" or "sorted"',
            fix='set moe_backend to "auto"',
        )  # fmt: skip
    if cfg.moe_backend != "auto":
        return cfg.moe_backend
    widths = (cfg.dim, 2 * cfg.expert_dim, cfg.expert_dim)
    return "sorted" if any(width * size % 16 for width in widths) else "grouped"


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


def _to_experts(ops: Ops, x: Ghost, width: int, order: Ghost, inverse: Ghost) -> Ghost:
    """``_ToExperts``: one row for each choice."""
    token_of_row = ops.integers(order.n)
    y, n, size, rows = ops.new(order.n * width, x.size), x.n, x.size, order.n * width
    del token_of_row

    def apply(grads: Gradients, saved: Saved) -> Gradients:
        gathered = ops.new(rows, size)
        summed = ops.new(n, size)
        del gathered
        return (summed,)

    ops.record((y,), (x,), apply, (order, inverse))
    return y


def _to_tokens(ops: Ops, y: Ghost, top_k: int, order: Ghost, inverse: Ghost) -> Ghost:
    """``_ToTokens``: the sum of each token's rows."""
    gathered = ops.new(y.n, y.size)
    out, n, size, chosen = ops.new(y.n // top_k, y.size), y.n, y.size, order.n
    del gathered

    def apply(grads: Gradients, saved: Saved) -> Gradients:
        token_of_row = ops.integers(chosen)
        spread = ops.new(n, size)
        del token_of_row
        return (spread,)

    ops.record((out,), (y,), apply, (order, inverse))
    return out


def _looped(ops: Ops, weight: Ghost) -> Stack:
    """``LoopedStack(weight)``; its node computes the joint gradient of all uses."""
    stack = Stack(weight.view())
    uses, n, size = stack.uses, weight.n, weight.size

    def apply(grads: Gradients, saved: Saved) -> Gradients:
        taken = list(uses)
        uses.clear()
        # on a CPU one buffer, for the rows of one expert, serves all of them: that is little
        joined = _joined(ops, taken) if ops.cuda else []
        gradient = ops.new(n, size, GRADIENTS)
        del joined, taken
        return (gradient,)

    ops.record((stack.weight,), (weight,), apply)
    return stack


def _joined(ops: Ops, uses: list[tuple[Ghost, Ghost]]) -> list[Ghost]:
    """Operands, then gradients, of all uses: one after the other, then sorted by expert."""
    joined = []
    for side in (0, 1):
        together = ops.new(sum(use[side].n for use in uses), uses[0][side].size)
        joined.append(ops.new(together.n, together.size))
        del together
    return joined


def _deferred(ops: Ops, x: Ghost, stack: Stack, n: int) -> Ghost:
    """``_DeferredProduct`` with ``n`` results; operand and gradient stay for :func:`_looped`."""
    y, uses = ops.new(n, x.size), stack.uses

    def apply(grads: Gradients, saved: Saved) -> Gradients:
        (grad,), operand = grads, saved[0]
        assert grad is not None
        uses.append((operand, grad))
        return (ops.new(operand.n, operand.size), None)

    ops.record((y,), (x, stack.weight), apply, (x, stack.weight))
    return y
