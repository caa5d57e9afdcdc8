"""Autograd without values: tensors that are a number of bytes, and what of them lives when.

A :class:`Meter` counts the bytes of all storages that somebody still refers to. Forward code
written against :class:`Ghost` tensors frees its intermediate results where the real code does,
because CPython drops both when the last reference goes; what a node saves for the backward pass
stays until that node has run. :meth:`Tape.backward` runs the nodes in the order of PyTorch's
engine: those whose gradients are complete, the latest made first. Gradients of one tensor are added
in place.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from math import prod

INT64, FLOAT32, HALF, BOOL = 8, 4, 2, 1
"""Bytes of an element."""
ACTIVATIONS, GRADIENTS, COPIES, GATHERED, HEAD = (
    "activations", "gradients", "half-precision weights", "gathered weights", "loss head",
)  # fmt: skip
"""What bytes are for."""


class Meter:
    """Bytes alive, their peak, and what they were for at the peak.

    Attributes:
        live: Bytes alive now.
        peak: Most bytes that were ever alive at once.
        now: Label -> bytes alive now.
        at_peak: Label -> bytes alive when the peak was reached.
    """

    def __init__(self) -> None:
        self.live = self.peak = 0
        self.now: dict[str, int] = {}
        self.at_peak: dict[str, int] = {}

    def add(self, count: int, label: str) -> None:
        """``count`` bytes more (or, if negative, fewer) of what ``label`` names."""
        self.live += count
        self.now[label] = self.now.get(label, 0) + count
        if self.live > self.peak:
            self.peak, self.at_peak = self.live, dict(self.now)


class Storage:
    """Bytes that are counted as long as this object lives."""

    __slots__ = ("_count", "_label", "_meter")

    def __init__(self, meter: Meter, count: int, label: str) -> None:
        self._meter, self._count, self._label = meter, count, label
        meter.add(count, label)

    def __del__(self) -> None:
        self._meter.add(-self._count, self._label)


class Ghost:
    """A tensor without values.

    Attributes:
        n: Elements.
        size: Bytes of an element.
        storage: Where it lies, shared by views; None for bytes that are counted elsewhere.
        node: What computed it, if gradient flows through it.
        slot: Which of the node's results it is.
    """

    __slots__ = ("n", "node", "size", "slot", "storage")

    def __init__(
        self, n: int, size: int, storage: Storage | None, node: Node | None = None, slot: int = 0
    ) -> None:
        self.n, self.size, self.storage, self.node, self.slot = n, size, storage, node, slot

    def view(self, n: int | None = None) -> Ghost:
        """The same storage, or ``n`` elements of it, without gradient."""
        return Ghost(self.n if n is None else n, self.size, self.storage)


class Weight(Ghost):
    """A float32 parameter as the forward pass reads it; its own bytes are counted elsewhere.

    Attributes:
        shape: Its axes.
        grad: Its gradient, kept from one backward pass to the next.
    """

    __slots__ = ("grad", "keeps_grad", "shape")

    def __init__(self, shape: tuple[int, ...], keeps_grad: bool = True) -> None:
        super().__init__(prod(shape), FLOAT32, None)
        self.shape, self.keeps_grad = shape, keeps_grad
        self.grad: Ghost | None = None
        # it saves nothing, so it runs as soon as it can
        self.node = Node(float("inf"), (), self._accumulate, ())

    def _accumulate(self, grads: Gradients, saved: Saved) -> Gradients:
        if self.grad is None and self.keeps_grad:
            self.grad = grads[0]
        return ()


Saved = Sequence[Ghost]
Gradients = Sequence[Ghost | None]
Apply = Callable[[Gradients, Saved], Gradients]
"""``apply(gradients of the results, what was saved) -> gradients of the operands``."""


class Node:
    """A step of the backward pass.

    Args:
        number: Nodes made later have larger ones.
        operands: What the forward operation read; a gradient goes to those that need one.
        apply: Computes the gradients, and allocates what the real kernel allocates.
        saved: What it needs for that.
        n_results: Results of the forward operation.
    """

    __slots__ = ("apply", "edges", "n_results", "number", "region", "saved")

    def __init__(
        self,
        number: float,
        operands: Sequence[Ghost],
        apply: Apply,
        saved: Saved,
        n_results: int = 1,
    ) -> None:
        self.number, self.apply, self.n_results = number, apply, n_results
        self.edges = [(x.node, x.slot, x.n, x.size) for x in operands]
        self.saved = list(saved)
        self.region: Region | None = None

    def __lt__(self, other: Node) -> bool:
        return self.number > other.number


class Region:
    """Nodes of a checkpointed call: what they saved is dropped, and computed again when needed.

    Args:
        again: Makes so many of the same nodes once more.
    """

    def __init__(self, again: Callable[[int], list[Node]]) -> None:
        self.nodes: list[Node] = []
        # kept, with the arguments of the call, until the last of the nodes has run
        self._again = again

    def fill(self) -> None:
        """Compute again what all nodes save; only the first call does anything."""
        nodes, self.nodes = self.nodes, []
        if nodes:
            for node, twin in zip(nodes, self._again(len(nodes)), strict=True):
                node.saved, twin.saved = twin.saved, []


class Tape:
    """Makes tensors and nodes, and runs the backward pass.

    Attributes:
        meter: Counts the bytes.
        recording: Whether operations make nodes (autograd is on).
        label: What new tensors are for.
    """

    def __init__(self) -> None:
        self.meter = Meter()
        self.recording = True
        self.label = ACTIVATIONS
        self._number = 0
        self._made: list[Node] | None = None

    def new(self, n: int, size: int, label: str = "") -> Ghost:
        """A fresh tensor of ``n`` elements of ``size`` bytes."""
        return Ghost(n, size, Storage(self.meter, n * size, label or self.label))

    def record(
        self, results: Sequence[Ghost], operands: Sequence[Ghost], apply: Apply, saved: Saved = ()
    ) -> None:
        """Let gradient flow from ``results`` to those of ``operands`` that need one."""
        if not self.recording or all(x.node is None for x in operands):
            return
        self._number += 1
        node = Node(self._number, operands, apply, saved, len(results))
        for slot, result in enumerate(results):
            result.node, result.slot = node, slot
        if self._made is not None and node.saved:
            self._made.append(node)

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """New tensors are for ``label``."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    @contextmanager
    def grad(self, enabled: bool) -> Iterator[None]:
        """Whether operations make nodes."""
        before, self.recording = self.recording, enabled
        try:
            yield
        finally:
            self.recording = before

    def checkpointed(self, call: Callable[..., Ghost], *operands: Ghost) -> Ghost:
        """``call(*operands)``, keeping none of what its nodes save until they are about to run."""
        if not self.recording:
            return call(*operands)
        region = Region(lambda n: self._recomputed(call, [_detached(x) for x in operands], n))
        made = _Forgetful(region)
        with self._noting(made):
            result = call(*operands)
        region.nodes = list(made)
        return result

    def _recomputed(
        self, call: Callable[..., Ghost], operands: Sequence[Ghost], n: int
    ) -> list[Node]:
        """The ``n`` nodes of a checkpointed call that save something, made again; what comes after
        the last of them is not computed."""
        made = _Enough(n)
        with self._noting(made), suppress(_EnoughMade):
            call(*operands)
        return list(made)

    @contextmanager
    def _noting(self, made: list[Node]) -> Iterator[None]:
        """Nodes that save something are noted in ``made``."""
        outer, recording = self._made, self.recording
        self._made, self.recording = made, True
        try:
            yield
        finally:
            self._made, self.recording = outer, recording

    def backward(self, root: Ghost) -> None:
        """Run all nodes that ``root`` depends on; gradients stay in the weights."""
        assert root.node is not None
        waiting = _dependencies(root.node)
        buffers: dict[Node, list[Ghost | None]] = {root.node: [self.new(root.n, root.size)]}
        ready = [root.node]
        while ready:
            node = heapq.heappop(ready)
            if node.region is not None:
                node.region.fill()
            grads: Gradients = buffers.pop(node)
            results = list(node.apply(grads, node.saved))
            for i, (_, _, n, size) in enumerate(node.edges):
                results[i] = self._fitted(results[i], n, size)
            node.saved, node.region, grads = [], None, ()
            for i, (target, slot, _, _) in enumerate(node.edges):
                if target is None:
                    continue
                found = buffers.setdefault(target, [None] * target.n_results)
                if found[slot] is None:
                    found[slot] = results[i]
                waiting[target] -= 1
                if not waiting[target]:
                    heapq.heappush(ready, target)
                del found
            del results

    def _fitted(self, grad: Ghost | None, n: int, size: int) -> Ghost | None:
        """A gradient summed over what was broadcast, in the dtype of what it belongs to."""
        if grad is not None and grad.n != n:
            grad = self.new(n, grad.size)
        if grad is not None and grad.size != size:
            grad = self.new(n, size)
        return grad


class _Forgetful(list[Node]):
    """Takes the nodes of a region, and from them what they saved."""

    def __init__(self, region: Region) -> None:
        super().__init__()
        self._region = region

    def append(self, node: Node) -> None:
        node.saved, node.region = [], self._region
        super().append(node)


class _EnoughMade(Exception):
    """All nodes that were asked for are there."""


class _Enough(list[Node]):
    """Takes so many nodes."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self._n = n

    def append(self, node: Node) -> None:
        super().append(node)
        if len(self) == self._n:
            raise _EnoughMade


def _detached(x: Ghost) -> Ghost:
    """``x`` with a gradient that goes nowhere."""
    y = x.view()
    y.node = None if x.node is None else Node(0, (), lambda grads, saved: (), ())
    return y


def _dependencies(root: Node) -> dict[Node, int]:
    """Node -> how many gradients it waits for."""
    waiting: dict[Node, int] = {root: 0}
    stack = [root]
    while stack:
        for target, _, _, _ in stack.pop().edges:
            if target is None:
                continue
            if target not in waiting:
                waiting[target] = 0
                stack.append(target)
            waiting[target] += 1
    return waiting
