"""Packed weights against the unpacked ones, at odd sizes too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import distance
from torch import Tensor

import open_mythos.ops.quantized as quantized
from open_mythos.errors import ConfigError
from open_mythos.ops.experts.routed import routed_experts
from open_mythos.ops.quantized import (
    GROUPS,
    PACKED_ROWS,
    PackedWeight,
    pack,
    packed_experts,
    packed_linear,
)

ROUNDING = 0.008
"""Relative distance that bfloat16 inputs, weights and results may make."""
SIZES = {  # outputs, inputs, group; 0 is int8
    "int8": (48, 64, 0),
    "int8, no multiple of 16": (5, 7, 0),
    "int8, one weight": (1, 1, 0),
    "int8, in pieces": (1100, 1024, 0),
    "int4": (64, 32, 32),
    "int4, half a block": (32, 64, 32),
    "int4, less than half": (16, 64, 64),
    "int4, blocks and a rest": (176, 128, 64),
    "int4, one group": (80, 256, 256),
    "int4, no multiples": (70, 100, 64),
    "int4, one output": (1, 33, 32),
    "int4, in pieces": (592, 1024, 128),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def off(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def reference(x: Tensor, weight: PackedWeight) -> Tensor:
    """The matmul in float32."""
    return x.float() @ weight.unpacked(torch.float32)


def rounded(weight_OI: Tensor, group: int) -> Tensor:
    """What packing must keep of ``weight``: the formula, one group after the other, in float64."""
    out = torch.empty(weight_OI.shape, dtype=torch.float64)
    added = -weight_OI.shape[1] % group if group else 0
    for o, row in enumerate(F.pad(weight_OI.double(), (0, added))):
        for first in range(0, len(row), group or len(row)):
            part = row[first : first + (group or len(row))]
            if not group:
                scale = (part.abs().max() / 127).bfloat16().double()
                out[o] = (part / scale).round().clamp(-127, 127) * scale
                continue
            scale = ((part.max() - part.min()) / 15).bfloat16().double()
            zero = (part.min() + 8 * scale).bfloat16().double()
            level = ((part - zero) / scale).round().clamp(-8, 7)
            whole = level * scale + zero
            out[o, first : first + group] = whole[: weight_OI.shape[1] - first]
    return out


@pytest.mark.parametrize("size", [name for name in SIZES if "pieces" not in name])
def test_packing_keeps_the_nearest_levels(size):
    outputs, inputs, group = SIZES[size]
    weight = random(outputs, inputs)
    kept = pack(weight, group).unpacked(torch.float32).mT
    assert off(kept, rounded(weight, group)) < 1e-3  # a tie may fall to either side
    assert 0 < off(kept, weight) < (0.16 if group else 0.02) or weight.numel() == 1


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(16, 64),
        torch.full((16, 64), -3.0),
        1e-30 * random(16, 64),
        1e30 * random(16, 64),
    ],
    ids=["zeros", "constant", "tiny", "huge"],
)
def test_strange_weights_stay_finite(weight, group):
    kept = pack(weight, group).unpacked(torch.float32).mT
    assert kept.isfinite().all()
    assert (kept - weight).norm() <= 0.1 * weight.norm()


def test_bytes():
    weight = random(64, 128)
    for group, expected in ((0, 64 * 128 + 2 * 64), (32, 64 * 128 // 2 + 4 * 64 * 4)):
        packed = pack(weight, group)
        assert packed.levels.nbytes + packed.scale.nbytes == expected
        assert (packed.inputs, packed.outputs, packed.bits) == (128, 64, 4 if group else 8)


@pytest.mark.parametrize("rows", [0, 1, 3, 5, 67])
@pytest.mark.parametrize("size", SIZES)
def test_matmuls_equal_the_reference(size, rows, monkeypatch):
    outputs, inputs, group = SIZES[size]
    weight, x = pack(random(outputs, inputs), group), random(rows, inputs, seed=1).bfloat16()
    expected = reference(x, weight)
    for most in (0, 100):  # unpacked, by the kernel
        monkeypatch.setitem(PACKED_ROWS, weight.bits, most)
        out = packed_linear(x, weight)
        assert out.shape == (rows, outputs)
        assert out.dtype == torch.bfloat16
        assert rows == 0 or off(out, expected) < ROUNDING


def test_any_leading_axes_and_dtypes():
    weight = pack(random(32, 64), 32)
    x = random(2, 3, 64).transpose(0, 1)
    expected = torch.stack([packed_linear(each, weight) for each in x])
    assert packed_linear(x, weight).shape == (3, 2, 32)
    assert off(packed_linear(x, weight), expected) < ROUNDING
    assert off(packed_linear(x.double(), weight), expected) < ROUNDING


@pytest.mark.parametrize("group", [0, 32])
def test_few_rows_take_the_kernel(group, monkeypatch):
    weight, taken = pack(random(32, 64), group), []
    for name in ("_by_kernel", "_unpacked"):
        made = getattr(quantized, name)

        def spy(x: Tensor, weight: PackedWeight, name: str = name, made=made) -> Tensor:
            taken.append(name)
            return made(x, weight)

        monkeypatch.setattr(quantized, name, spy)
    most = PACKED_ROWS[weight.bits]
    for rows in (1, most, most + 1):
        packed_linear(random(rows, 64), weight)
    assert taken == ["_by_kernel", "_by_kernel", "_unpacked"]


EXPERTS = {  # N, D, F, E, C, group
    "int8": (7, 32, 16, 8, 2, 0),
    "int8, odd": (5, 7, 3, 4, 3, 0),
    "int8, one token": (1, 32, 16, 8, 2, 0),
    "int8, many rows": (70, 32, 16, 2, 2, 0),
    "int4": (7, 64, 32, 8, 2, 32),
    "int4, one token": (1, 64, 96, 8, 1, 32),
    "int4, many rows": (150, 64, 64, 3, 2, 64),
    "int4, odd": (5, 37, 41, 4, 3, 32),
    "more experts than choices": (2, 32, 32, 40, 2, 0),
}


def expert_inputs(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    n, d, f, e, c, group = EXPERTS[name]
    experts = torch.rand(n, e, generator=torch.Generator().manual_seed(3)).topk(c).indices
    weights = random(n, c, seed=4).sigmoid()
    stacks = random(e, d, 2 * f, seed=1) / d**0.5, random(e, f, d, seed=2) / f**0.5
    return random(n, d), *stacks, experts, weights, group


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_equal_the_reference(name):
    x, gate_up, down, experts, weights, group = expert_inputs(name)
    stacks = pack(gate_up.mT, group), pack(down.mT, group)
    unpacked = (stack.unpacked(torch.float32) for stack in stacks)
    expected = routed_experts(x, *unpacked, experts, weights, backend="reference")
    routed = experts, weights.bfloat16()
    for out in (
        quantized._each(x.bfloat16(), *stacks, *routed),
        quantized._gathered(x.bfloat16(), *stacks, *routed),
        routed_experts(x.bfloat16(), *(stack.unpacked() for stack in stacks), *routed),
    ):
        assert out.dtype == torch.bfloat16
        assert off(out, expected) < 2 * ROUNDING
    out = packed_experts(x, *stacks, experts, weights)
    assert off(out, expected) < 2 * ROUNDING
    # the reference is wrong by the rounding of the weights alone, and that is not nothing
    exact = routed_experts(x, gate_up, down, experts, weights, backend="reference")
    assert 1e-3 < off(expected, exact) < (0.25 if group else 0.03)


def test_a_token_does_not_depend_on_the_others():
    x, gate_up, down, experts, weights, group = expert_inputs("int4, many rows")
    stacks = pack(gate_up.mT, group), pack(down.mT, group)
    together = packed_experts(x, *stacks, experts, weights)
    alone = packed_experts(x[4:5], *stacks, experts[4:5], weights[4:5])
    assert off(alone, together[4:5]) < 2 * ROUNDING


def test_a_stack_is_packed_as_its_matrices():
    stack = random(3, 32, 64)
    for group in (0, 32):
        packed = pack(stack, group)
        for i in range(3):
            alone = pack(stack[i], group)
            assert torch.equal(packed[i].levels, alone.levels)
            assert torch.equal(packed[i].scale, alone.scale)
        assert distance(packed.unpacked()[1], packed[1].unpacked()) == 0


@pytest.mark.parametrize(("inputs", "group"), [(31, 32), (100, 128), (96, 48), (64, 16)])
def test_groups_that_cannot_be(inputs, group):
    with pytest.raises(ConfigError, match=f"groups of {group}"):
        pack(random(16, inputs), group)


def test_groups_are_those_of_the_kernel():
    for group in GROUPS:
        weight, x = pack(random(16, 256), group), random(2, 256)
        assert off(packed_linear(x, weight), reference(x, weight)) < ROUNDING
