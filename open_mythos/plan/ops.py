"""The operations of a forward pass: what each allocates, what it saves, what its gradient takes.

Every method stands for one operation of PyTorch in eager mode and follows its derivative: a product
saves both operands, a sigmoid its result, a concatenation nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from open_mythos.plan.tape import (
    COPIES,
    FLOAT32,
    GRADIENTS,
    HALF,
    INT64,
    Ghost,
    Gradients,
    Node,
    Saved,
    Tape,
    Weight,
)


class Ops(Tape):
    """A tape with operations.

    Args:
        autocast: Whether products run in half precision on float32 weights.
        cuda: CUDA's kernels instead of those of the CPU, where they differ.
    """

    def __init__(self, *, autocast: bool = False, cuda: bool = False) -> None:
        super().__init__()
        self.autocast, self.cuda = autocast, cuda
        self._weight_copies: dict[int, Ghost] = {}

    def leave_autocast(self) -> None:
        """Drop the copies of weights that nothing saved."""
        self._weight_copies.clear()

    def _recomputed(
        self, call: Callable[..., Ghost], operands: Sequence[Ghost], n: int
    ) -> list[Node]:
        """Within an autocast region of its own."""
        nodes = super()._recomputed(call, operands, n)
        self.leave_autocast()
        return nodes

    def to(self, x: Ghost, size: int) -> Ghost:
        """``x`` in a dtype of ``size`` bytes."""
        if x.size == size:
            return x
        y, n, before = self.new(x.n, size), x.n, x.size
        self.record((y,), (x,), lambda g, s: (self.new(n, before),))
        return y

    def low(self, x: Ghost) -> Ghost:
        """``x`` as a product reads it: under autocast a copy, of a whole weight made only once."""
        if not self.autocast or x.size == HALF:
            return x
        if not isinstance(x, Weight):
            return self.to(x, HALF)
        if id(x) not in self._weight_copies:
            with self.grad(True):
                self._weight_copies[id(x)] = self.weight_copy(x)
        return self._weight_copies[id(x)]

    def weight_copy(self, weight: Ghost) -> Ghost:
        """A half-precision copy of a float32 weight."""
        y, n = self.new(weight.n, HALF, COPIES), weight.n
        self.record((y,), (weight,), lambda g, s: (self.new(n, FLOAT32, GRADIENTS),))
        return y

    def split(self, x: Ghost, *parts: int, label: str = "") -> list[Ghost]:
        """Views of ``x``; their gradients are put together in a new tensor."""
        views = [x.view(n) for n in parts]
        n, size = x.n, x.size
        self.record(views, (x,), lambda g, s: (self.new(n, size, label),))
        return views

    def reshaped(self, x: Ghost) -> Ghost:
        """A view of all of ``x``, through which its gradient passes."""
        y = x.view()
        self.record((y,), (x,), lambda g, s: (g[0],))
        return y

    def part(self, x: Ghost, n: int) -> Ghost:
        """A slice of ``n`` elements; its gradient is as large as ``x``."""
        y, full, size = x.view(n), x.n, x.size
        self.record((y,), (x,), lambda g, s: (self.new(full, size),))
        return y

    def copy(self, x: Ghost) -> Ghost:
        """A contiguous copy."""
        y = self.new(x.n, x.size)
        self.record((y,), (x,), lambda g, s: (g[0],))
        return y

    def pad(self, x: Ghost, n: int) -> Ghost:
        """``x`` filled up to ``n`` elements."""
        y, before, size = self.new(n, x.size), x.n, x.size
        self.record((y,), (x,), lambda g, s: (self.new(before, size),))
        return y

    def spread(self, x: Ghost, n: int) -> Ghost:
        """A view that repeats ``x``; its gradient is summed."""
        y, before, size = x.view(n), x.n, x.size
        self.record((y,), (x,), lambda g, s: (self.new(before, size),))
        return y

    def take(self, x: Ghost, n: int, index: Ghost) -> Ghost:
        """``n`` elements picked by a saved index; the gradient is put back into zeros."""
        y, before, size = self.new(n, x.size), x.n, x.size
        self.record((y,), (x,), lambda g, s: (self.new(before, size),), (index,))
        return y

    def cat(self, *xs: Ghost) -> Ghost:
        """Side by side; each gets a view of the gradient."""
        y = self.new(sum(x.n for x in xs), max(x.size for x in xs))
        parts = [x.n for x in xs]

        def apply(grads: Gradients, saved: Saved) -> Gradients:
            return [_one(grads).view(n) for n in parts]

        self.record((y,), xs, apply)
        return y

    def add(self, x: Ghost, y: Ghost) -> Ghost:
        """A sum; what is smaller is broadcast."""
        out = self.new(max(x.n, y.n), max(x.size, y.size))
        self.record((out,), (x, y), lambda g, s: (g[0], g[0]))
        return out

    def less(self, x: Ghost, y: Ghost) -> Ghost:
        """x - y of equal shapes."""
        out, n, size = self.new(x.n, x.size), x.n, x.size
        self.record((out,), (x, y), lambda g, s: (g[0], self.new(n, size)))
        return out

    def scaled(self, x: Ghost) -> Ghost:
        """``x`` times what needs no gradient and is counted elsewhere."""
        y, n, size = self.new(x.n, x.size), x.n, x.size
        self.record((y,), (x,), lambda g, s: (self.new(n, size),))
        return y

    def mul(self, x: Ghost, y: Ghost) -> Ghost:
        """A product; what is smaller is broadcast."""
        n, size = max(x.n, y.n), max(x.size, y.size)
        out, wants = self.new(n, size), (x.node is not None, y.node is not None)

        def apply(grads: Gradients, saved: Saved) -> Gradients:
            return [self.new(n, size) if wanted else None for wanted in wants]

        self.record((out,), (x, y), apply, _saved(x, y))
        return out

    def unary(self, x: Ghost, *, saves_result: bool = False) -> Ghost:
        """An elementwise function; its backward needs the operand or the result."""
        y, n, size = self.new(x.n, x.size), x.n, x.size
        saved = y.view() if saves_result else x
        self.record((y,), (x,), lambda g, s: (self.new(n, size),), (saved,))
        return y

    def total(self, x: Ghost, n: int) -> Ghost:
        """A sum that leaves ``n`` elements; its gradient is a repeating view."""
        y, before = self.new(n, x.size), x.n
        self.record((y,), (x,), lambda g, s: (_one(g).view(before),))
        return y

    def rms_norm(self, x: Ghost, weight: Weight) -> Ghost:
        """``RMSNorm.forward``: computed and returned in float32, the weight's dtype."""
        x, rows = self.to(x, FLOAT32), x.n // weight.n
        y, root = self.new(x.n, FLOAT32), self.new(rows, FLOAT32)
        n, width = x.n, weight.n

        def apply(grads: Gradients, saved: Saved) -> Gradients:
            return self.new(n, FLOAT32), self.new(width, FLOAT32, GRADIENTS)

        self.record((y,), (x, weight), apply, (x, weight, root))
        return y

    def linear(self, x: Ghost, weight: Weight) -> Ghost:
        """x W^T."""
        return self.product(self.low(x), self.low(weight), weight.shape[0])

    def product(self, x: Ghost, weight: Ghost, width: int, matrices: int = 1) -> Ghost:
        """A product with a weight, whose results are ``width`` wide.

        Several ``matrices`` of equal shape share the rows of ``x`` among them.
        """
        rows = x.n * matrices * width // weight.n
        y, n, size, weights = self.new(rows * width, x.size), x.n, x.size, weight.n
        wants = x.node is not None, weight.node is not None

        def apply(grads: Gradients, saved: Saved) -> Gradients:
            of_weight = self.new(weights, size, GRADIENTS) if wants[1] else None
            return (self.new(n, size) if wants[0] else None, of_weight)

        self.record((y,), (x, weight), apply, _saved(x, weight))
        return y

    def contraction(self, x: Ghost, y: Ghost, n: int) -> Ghost:
        """A product of two activations, with ``n`` results."""
        out, counts, size = self.new(n, x.size), (x.n, y.n), x.size
        self.record(
            (out,), (x, y), lambda g, s: [self.new(each, size) for each in counts], _saved(x, y)
        )
        return out

    def embedding(self, ids: Ghost, weight: Weight) -> Ghost:
        """Rows of ``weight``."""
        y, n = self.new(ids.n * weight.shape[1], FLOAT32), weight.n
        self.record((y,), (weight,), lambda g, s: (self.new(n, FLOAT32, GRADIENTS),), (ids,))
        return y

    def attention(self, q: Ghost, k: Ghost, v: Ghost, rows: int) -> Ghost:
        """The fused kernel: saves its operands, its result and a float32 for each of ``rows``
        (query, head) pairs. CUDA's backward sums the queries' gradient in float32."""
        y, log_sum = self.new(q.n, q.size), self.new(rows, FLOAT32)
        counts, size = (q.n, k.n, v.n), q.size

        def apply(grads: Gradients, saved: Saved) -> Gradients:
            wide = self.new(counts[0], FLOAT32) if self.cuda and size != FLOAT32 else None
            found = [self.new(n, size) for n in counts]
            del wide
            return found

        self.record((y,), (q, k, v), apply, (q, k, v, y.view(), log_sum))
        return y

    def rope(self, x: Ghost) -> Ghost:
        """``apply_rope``: halves rotated in float32; the table needs no gradient."""
        wide = self.to(x, FLOAT32)
        first, second = self.split(wide, x.n // 2, x.n // 2)
        rotated = self.cat(
            self.less(self.scaled(first), self.scaled(second)),
            self.add(self.scaled(first), self.scaled(second)),
        )
        return self.to(rotated, x.size)

    def integers(self, n: int) -> Ghost:
        """``n`` elements of int64."""
        return self.new(n, INT64)


def _saved(x: Ghost, y: Ghost) -> list[Ghost]:
    """What a product of the two saves: each for the gradient of the other."""
    return [each for each, other in ((x, y), (y, x)) if other.node is not None]


def _one(grads: Gradients) -> Ghost:
    (grad,) = grads
    assert grad is not None
    return grad
