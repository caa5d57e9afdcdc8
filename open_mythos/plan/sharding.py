"""Sharding in ghost tensors: when FSDP2 gathers weights, lets them go and adds up gradients.

Follows ``torch.distributed.fsdp`` and ``train/processes/parallel.py``. Weights are gathered in
float32 into one flat buffer and copied out of it; the buffer of a unit stays until the next one has
been gathered. In the backward pass the unit before is gathered ahead. Gradients are copied into one
padded buffer, which stays until the next unit's is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

from open_mythos.plan.ops import Ops
from open_mythos.plan.parameters import LOOP, ROOT, Parameter
from open_mythos.plan.tape import FLOAT32, GATHERED, GRADIENTS, Ghost, Gradients, Saved, Weight


class Unit:
    """Parameters that are gathered together.

    Args:
        parameters: They and their weights.
        shard: Processes that share them.
        reshard: Whether they are let go between forward and backward pass.
    """

    def __init__(
        self, parameters: Sequence[tuple[Parameter, Weight]], shard: int, reshard: bool
    ) -> None:
        self.weights = [weight for _, weight in parameters]
        self.reshard = reshard
        self.padded = shard * sum(parameter.chunk(shard) for parameter, _ in parameters)
        trained = [parameter for parameter, _ in parameters if parameter.trained]
        self.local = sum(parameter.chunk(shard) for parameter in trained)
        self.padded_grads = shard * self.local
        self.whole: Ghost | None = None
        self.buffer: Ghost | None = None
        self.grad: Ghost | None = None


class Sharding:
    """All units of a model, and the buffers between them.

    Args:
        weights: Parameter -> weight, those of experts that live apart left out.
        shard: Processes that share one copy of the model.
    """

    def __init__(self, weights: Sequence[tuple[Parameter, Weight]], shard: int) -> None:
        names = dict.fromkeys(parameter.unit for parameter, _ in weights)
        self.units = {
            name: Unit(
                [pair for pair in weights if pair[0].unit == name], shard,
                reshard=name not in (ROOT, LOOP),
            )
            for name in names
        }  # fmt: skip
        self._order: list[Unit] = []
        self._lingering: Ghost | None = None
        self._reduced: Ghost | None = None

    def begin(self, ops: Ops) -> None:
        """The outermost unit is called."""
        self._order.clear()
        self._gather(ops, self.units[ROOT])

    def enter(self, ops: Ops, name: str, x: Ghost) -> Ghost:
        """A unit is called with ``x``; gradients are added up when they arrive there."""
        unit = self.units[name]
        self._gather(ops, unit)
        y = x.view()

        def post_backward(grads: Gradients, saved: Saved) -> Gradients:
            self._add_up(ops, unit)
            return grads

        ops.record((y,), (x,), post_backward)
        return y

    def leave(self, ops: Ops, name: str, y: Ghost) -> Ghost:
        """A unit returns ``y``."""
        unit = self.units[name]
        if unit.reshard:
            unit.whole = None
        before = self._order[-1] if self._order else None
        self._order.append(unit)
        z = y.view()

        def pre_backward(grads: Gradients, saved: Saved) -> Gradients:
            self._gather_again(ops, unit)
            if before is not None and before.whole is None:
                before.buffer = ops.new(before.padded, FLOAT32, GATHERED)
            return grads

        ops.record((z,), (y,), pre_backward)
        return z

    def end(self, ops: Ops) -> None:
        """The outermost unit returns; its backward begins with gathering the last one inside."""
        self._lingering = None
        if self._order and self._order[-1].whole is None:
            last = self._order[-1]
            last.buffer = ops.new(last.padded, FLOAT32, GATHERED)

    def finish(self, ops: Ops) -> None:
        """The backward pass is over."""
        self._add_up(ops, self.units[ROOT])
        self._reduced = None

    def _gather(self, ops: Ops, unit: Unit) -> None:
        buffer = ops.new(unit.padded, FLOAT32, GATHERED)
        self._lingering = None
        unit.whole = ops.new(unit.padded, FLOAT32, GATHERED)
        self._lingering = buffer

    def _gather_again(self, ops: Ops, unit: Unit) -> None:
        if unit.whole is None:
            unit.buffer = unit.buffer or ops.new(unit.padded, FLOAT32, GATHERED)
            unit.whole = ops.new(unit.padded, FLOAT32, GATHERED)
        unit.buffer = None

    def _add_up(self, ops: Ops, unit: Unit) -> None:
        """``post_backward``."""
        unit.whole = None
        self._reduced = None
        self._reduced = ops.new(unit.padded_grads, FLOAT32, GRADIENTS)
        for weight in unit.weights:
            weight.grad = None
        found = ops.new(unit.local, FLOAT32, GRADIENTS)
        if not ops.cuda:  # gloo reduces in a copy, NCCL where it is
            copy = ops.new(unit.padded_grads, FLOAT32, GRADIENTS)
            del copy
        if unit.grad is None:
            unit.grad = found
