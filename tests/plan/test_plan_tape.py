"""Ghost tensors: what lives, what is saved, in which order a backward pass runs."""

from __future__ import annotations

import pytest
import torch

from open_mythos.ops import cross_entropy
from open_mythos.plan import forward
from open_mythos.plan.ops import Ops
from open_mythos.plan.tape import FLOAT32, GRADIENTS, HALF, Ghost, Tape, Weight


def chain(ops: Ops, x: Ghost, weights: list[Weight]) -> Ghost:
    for weight in weights:
        x = ops.unary(ops.linear(x, weight), saves_result=True)
    return x


def test_what_nobody_refers_to_is_gone() -> None:
    tape = Tape()
    x = tape.new(10, FLOAT32)
    y = x.view()
    assert tape.meter.live == 40
    del x
    assert tape.meter.live == 40
    del y
    assert tape.meter.live == 0
    assert tape.meter.peak == 40


def test_results_live_on_where_they_are_saved() -> None:
    ops = Ops()
    x = ops.new(6, FLOAT32)
    y = ops.linear(x, Weight((4, 3)))
    del x
    assert ops.meter.live == 4 * (6 + 8)  # the product saves its operand
    del y
    assert ops.meter.live == 0
    with ops.grad(False):
        result = ops.linear(ops.new(6, FLOAT32), Weight((4, 3)))
    assert result.node is None
    assert ops.meter.live == 4 * 8


def test_backward_frees_what_was_saved_and_keeps_gradients() -> None:
    ops, weights = Ops(), [Weight((3, 3)) for _ in range(4)]
    loss = ops.total(chain(ops, ops.new(6, FLOAT32), weights), 1)
    ops.backward(loss)
    del loss
    assert ops.meter.live == 4 * 9 * 4
    assert ops.meter.now[GRADIENTS] == ops.meter.live
    ops.backward(ops.total(chain(ops, ops.new(6, FLOAT32), weights), 1))
    assert ops.meter.live == 4 * 9 * 4  # added in place


def test_a_weight_used_twice_has_one_gradient() -> None:
    ops, weight = Ops(), Weight((3, 3))
    ops.backward(ops.total(chain(ops, ops.new(6, FLOAT32), [weight] * 5), 1))
    assert ops.meter.live == 4 * 9


def test_gradients_come_in_the_dtype_of_what_they_belong_to() -> None:
    ops, weight = Ops(autocast=True), Weight((3, 3))
    x = ops.new(6, FLOAT32)
    loss = ops.total(ops.linear(x, weight), 1)
    assert loss.size == HALF
    ops.leave_autocast()
    ops.backward(loss)
    assert weight.grad is not None
    assert weight.grad.size == FLOAT32


def test_autocast_copies_a_weight_once() -> None:
    ops, weight = Ops(autocast=True), Weight((3, 3))
    x = ops.new(6, HALF)
    before = ops.meter.live
    y = ops.linear(x, weight)
    once = ops.meter.live - before - 2 * y.n
    z = ops.linear(x, weight)
    assert ops.meter.live - before == once + 2 * (y.n + z.n)
    assert once == 2 * weight.n


def test_checkpointing_keeps_the_operand_alone_and_gives_the_same_gradients() -> None:
    live = {}
    for checkpoint in (False, True):
        ops, weights = Ops(), [Weight((8, 8)) for _ in range(5)]
        x = ops.linear(ops.new(16, FLOAT32), weights[0])

        def call(x: Ghost, ops: Ops = ops, weights: list[Weight] = weights) -> Ghost:
            return chain(ops, x, weights)

        y = ops.checkpointed(call, x) if checkpoint else call(x)
        live[checkpoint] = ops.meter.live
        ops.backward(ops.total(y, 1))
        assert all(weight.grad is not None for weight in weights)
        del x, y
        assert ops.meter.live == 4 * 64 * 5
    kept, again = live[False], live[True]
    assert again == 4 * (16 + 16 + 16)  # operands of both, and the result
    assert kept == again + 4 * 16 * 4  # one result of each product but the last


def test_what_comes_after_the_last_saved_tensor_is_not_computed_again() -> None:
    ops, weight, reached = Ops(), Weight((4, 4)), []

    def call(x: Ghost) -> Ghost:
        y = chain(ops, x, [weight])
        reached.append(ops.new(1000, FLOAT32).n)
        return y

    y = ops.checkpointed(call, ops.linear(ops.new(8, FLOAT32), weight))
    ops.backward(ops.total(y, 1))
    assert reached == [1000]


def test_recomputing_happens_once_and_late() -> None:
    ops, weight, calls = Ops(), Weight((4, 4)), []

    def call(x: Ghost) -> Ghost:
        calls.append(ops.meter.live)
        return chain(ops, x, [weight] * 3)

    x = ops.linear(ops.new(8, FLOAT32), weight)
    y = ops.checkpointed(call, x)
    assert len(calls) == 1
    ops.backward(ops.total(y, 1))
    assert len(calls) == 2


def test_nothing_is_recorded_without_gradient() -> None:
    ops, weight = Ops(), Weight((4, 4))
    with ops.grad(False):
        y = ops.checkpointed(lambda x: chain(ops, x, [weight]), ops.new(8, FLOAT32))
    assert y.node is None
    with pytest.raises(AssertionError):
        ops.backward(y)


def test_constants_are_those_of_the_kernels() -> None:
    """The plan loads no torch, so it repeats two numbers and a rule."""
    ways = {False: torch.device("cpu"), True: torch.device("cuda")}
    assert forward.CHUNK_BYTES == {
        False: cross_entropy.CHUNK_BYTES, True: cross_entropy.ACCELERATOR_CHUNK_BYTES,
    }  # fmt: skip
    assert forward.BLOCK_BYTES == {
        False: cross_entropy.BLOCK_BYTES, True: cross_entropy.ACCELERATOR_BLOCK_BYTES,
    }  # fmt: skip
    for cuda, device in ways.items():
        for rows, vocab in ((0, 7), (5, 10**9), (16384, 32000), (10**6, 199_999)):
            planned = forward.chunk_rows(rows, vocab, HALF, cuda)
            assert planned == cross_entropy.chunk_rows(rows, vocab, torch.bfloat16, device)
