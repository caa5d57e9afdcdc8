"""The mixture of experts in ghost tensors: ``layers/moe.py``, ``ops/experts`` and
``train/processes/expert_parallel.py``, line by line, as if all experts had equally many tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from open_mythos.config import MythosConfig
from open_mythos.errors import ConfigError
from open_mythos.ops.experts.sizes import BATCHED_TOKENS, DEFERRED_TOKENS, ROWS, WAITING, padded
from open_mythos.plan.layers import FeedForward, Weights
from open_mythos.plan.ops import Ops
from open_mythos.plan.tape import FLOAT32, GRADIENTS, HALF, Ghost, Gradients, Saved, Weight


class Uses:
    """Operands and results' gradients that wait for a stack of experts.

    Args:
        shape: Experts, inputs and outputs of each.
        size: Bytes of one of the weights, and of their gradient.
        computed: Bytes of one as products read it.
    """

    def __init__(self, shape: tuple[int, ...], size: int, computed: int) -> None:
        self._shape, self._size, self._computed = shape, size, computed
        self._left: list[tuple[Ghost, Ghost]] = []
        self._rows = 0
        self._total: Ghost | None = None

    def leave(self, ops: Ops, rows: int, operand: Ghost, grad: Ghost) -> None:
        """Add one use, of ``rows`` choices."""
        self._left.append((operand, grad))
        self._rows += rows
        if sum(x.n + y.n for x, y in self._left) >= WAITING * prod(self._shape):
            self._add_up(ops)

    def take(self, ops: Ops) -> Ghost | None:
        """The gradient of all uses."""
        if self._left:
            self._add_up(ops)
        total, self._total = self._total, None
        return total

    def _add_up(self, ops: Ops) -> None:
        taken, self._left, rows, self._rows = self._left, [], self._rows, 0
        n, (experts, *widths) = prod(self._shape), self._shape
        converted = self._computed != self._size
        if ops.cuda:
            working = _joined(ops, taken)
            # the kernel's result, which is then added to the total
            working += [ops.new(n, self._computed)] if converted else []
        else:
            # buffers for the rows of one expert serve all of them
            long = _of_fullest(rows, experts, self._computed)
            working = [ops.new(long * width, self._computed) for width in widths]
            working += [ops.new(prod(widths), self._computed)] if converted else []
        if self._total is None or not (ops.cuda and converted):
            gradient = ops.new(n, self._size, GRADIENTS)
            self._total = gradient if self._total is None else self._total
        del working, taken


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
        stacks = ((self.gate_up, gate_up), (self.down, down)) if defers else ()
        return gate_up, down, [_looped(ops, *each, call) for each in stacks]

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
                value=self.cfg.moe_backend,
                allowed='"auto", "batched", "grouped" or "sorted"',
                fix='set moe_backend to "auto"',
            )  # fmt: skip
        x, weights = ops.to(x, gate_up.size), ops.to(weights, gate_up.size)
        size, chosen, tokens = x.size, weights.n, x.n
        # a node keeps alive what it refers to: numbers and lists, no tensors
        waiting, sizes = [stack.uses for stack in stacks], (gate_up.n, down.n)
        way = _Batched if self._batches(ops, chosen, size) else _Grouped
        order = ops.integers(chosen)
        here = way(ops, chosen, self.cfg.dim, self.cfg.expert_dim, tokens, size, self.local_experts)
        y, first = here.forward()

        def apply(grads: Gradients, saved: Saved) -> Gradients:
            return here.backward(waiting, sizes)

        through = [stack.weight for stack in stacks] or [gate_up, down]
        kept = (x, weights, *through, experts, first, order)
        ops.record((y,), (x, weights, *through), apply, kept)
        return y

    def _batches(self, ops: Ops, chosen: int, size: int) -> bool:
        """Whether experts share products."""
        if self.cfg.moe_backend == "auto":
            many = chosen >= BATCHED_TOKENS * self.local_experts
            return not ops.cuda and size == HALF and many
        if self.cfg.moe_backend == "batched" and ops.cuda:
            raise ConfigError(
                "batched products are those of a CPU", where="moe_backend", value="batched",
                allowed='on a GPU "auto", "grouped" or "sorted"', fix='set moe_backend to "auto"',
            )  # fmt: skip
        return self.cfg.moe_backend == "batched"


@dataclass
class _Grouped:
    """``grouped.forward`` and ``grouped.backward``.

    Attributes:
        ops: What is recorded.
        chosen: Choices of all tokens.
        dim: Width of the model.
        hidden: Width of an expert.
        tokens: Elements of all tokens.
        size: Bytes of one.
        experts: How many share the choices.
    """

    ops: Ops
    chosen: int
    dim: int
    hidden: int
    tokens: int
    size: int
    experts: int

    def new(self, rows: int, width: int) -> Ghost:
        """A new matrix."""
        return self.ops.new(rows * width, self.size)

    def to_tokens(self) -> Ghost:
        """The sum of each token's rows."""
        return _to_tokens(self.ops, self.chosen, self.chosen * self.dim, self.tokens, self.size)

    def forward(self) -> tuple[Ghost, Ghost]:
        """What tokens get, and what is kept."""
        first = self._first_product()
        activated, second = (self.new(self.chosen, width) for width in (self.hidden, self.dim))
        y = self.to_tokens()
        del activated, second
        return y, first

    def _first_product(self) -> Ghost:
        token_of_row, gathered = self.ops.integers(self.chosen), self.new(self.chosen, self.dim)
        product = self.new(self.chosen, 2 * self.hidden)
        del token_of_row, gathered
        return product

    def backward(self, waiting: list[Uses], sizes: tuple[int, int]) -> Gradients:
        """Gradients of tokens, weights and both stacks (``sizes`` elements), unless they wait."""
        ops, chosen = self.ops, self.chosen
        number_of_row, row_weights = ops.integers(chosen), self.new(chosen, 1)
        grad = self.new(chosen, self.dim)
        d_hidden, d_first = self.new(chosen, self.hidden), self.new(chosen, 2 * self.hidden)
        silu, again = self.new(chosen, self.hidden), self.new(chosen, self.hidden)
        d_weights = self.new(chosen, 1)
        del silu
        d_down = d_gate_up = None
        if waiting:
            waiting[1].leave(ops, chosen, again, grad if ops.cuda else self.new(self.tokens, 1))
        else:
            d_down = ops.new(sizes[1], self.size, GRADIENTS)
        del d_hidden, again, grad
        few = waiting and not ops.cuda
        rows = self.new(self.tokens, 1) if few else self.new(chosen, self.dim)
        if waiting:
            waiting[0].leave(ops, chosen, rows, d_first)
        else:
            d_gate_up = ops.new(sizes[0], self.size, GRADIENTS)
        del rows
        d_rows = self.new(chosen, self.dim)
        d_x = self.to_tokens()
        del d_rows, d_first, number_of_row, row_weights, d_weights
        return d_x, self.new(chosen, 1), d_gate_up, d_down


class _Batched(_Grouped):
    """``batched.forward`` and ``batched.backward``."""

    @property
    def batch_rows(self) -> int:
        """Padded rows of a batch."""
        width = _of_fullest(self.chosen, self.experts, self.size)
        return max(width, min(ROWS, self.experts * width))

    def forward(self) -> tuple[Ghost, Ghost]:
        """As above: one batch after the other is gathered, and its results are put together."""
        kept = self.ops.integers(self.chosen), self.new(self.chosen, 1)
        first, all_rows = self.new(self.chosen, 2 * self.hidden), self.new(self.chosen, self.dim)
        n = self.batch_rows
        batch = [self.new(n, width) for width in (self.dim, 2 * self.hidden, self.hidden)]
        result = self.new(n, self.dim)
        del result
        y = self.to_tokens()
        del kept, all_rows, batch
        return y, first

    def backward(self, waiting: list[Uses], sizes: tuple[int, int]) -> Gradients:
        """As above."""
        ops, chosen, n = self.ops, self.chosen, self.batch_rows
        kept = ops.integers(chosen), self.new(chosen, 1), self.new(chosen, 1)
        rows = self.new(chosen, self.dim)
        d_gate_up, d_down = (
            (None, None) if waiting else (ops.new(each, self.size, GRADIENTS) for each in sizes)
        )
        left = [self.new(chosen, w) for w in (2 * self.hidden, self.hidden)] if waiting else []
        grad = self.new(n, self.dim)
        through = [self.new(n, width * self.hidden) for width in (1, 2)]
        batch = [self.new(n, width * self.hidden) for width in (2, 1)]
        silu = self.new(n, self.hidden)
        del through, silu
        result = self.new(n, self.dim)
        del result
        if waiting:
            waiting[1].leave(ops, chosen, left[1], self.new(self.tokens, 1))
            waiting[0].leave(ops, chosen, self.new(self.tokens, 1), left[0])
        d_weights, d_x = self.new(chosen, 1), self.to_tokens()
        del kept, rows, left, grad, batch
        return d_x, d_weights, d_gate_up, d_down


def _of_fullest(rows: int, experts: int, size: int) -> int:
    """Rows of the expert that has most, somewhat more than its share; in half precision padded."""
    most = 5 * rows // (4 * experts)
    return padded(most) if size == HALF else most


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


def _looped(ops: Ops, weight: Weight, computed: Ghost, call: Call) -> Stack:
    """``Context.looped``: a stack whose node computes the joint gradient of all uses."""
    if id(weight) in call.stacks:
        return call.stacks[id(weight)]
    uses = Uses(weight.shape, weight.size, computed.size)
    stack = call.stacks[id(weight)] = Stack(computed.view(), uses)
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
