"""Renaming is strict both ways; what the functions of the rules do."""

import pytest
import torch

from open_mythos import DataError
from open_mythos.interop import names
from open_mythos.interop.names import Rule, per_block, renamed
from open_mythos.ops.rope import apply_rope, rope_table

THEIRS = {
    "embed.weight": torch.randn(5, 4),
    "layers.3.k.weight": torch.randn(2, 4),
    "layers.3.v.weight": torch.randn(2, 4),
    "layers.7.k.weight": torch.randn(2, 4),
    "layers.7.v.weight": torch.randn(2, 4),
}
BLOCK = (
    Rule("{block}.kv.weight", ("layers.{i}.k.weight", "layers.{i}.v.weight"), names.stacked),
)  # fmt: skip
RULES = [
    Rule("embedding.weight", ("embed.weight",)),
    Rule("gate.bias", (), names.fixed(torch.ones(1))),
    *per_block(BLOCK, [("prelude.0", 3), ("loop.0", 7)]),
]
SHAPES = {
    "embedding.weight": torch.empty(5, 4, device="meta"),
    "gate.bias": torch.empty(1, device="meta"),
    "prelude.0.kv.weight": torch.empty(4, 4, device="meta"),
    "loop.0.kv.weight": torch.empty(4, 4, device="meta"),
}


def test_every_tensor_is_made():
    made = renamed(THEIRS, RULES, SHAPES)
    assert made.keys() == SHAPES.keys()
    assert torch.equal(made["loop.0.kv.weight"][2:], THEIRS["layers.7.v.weight"])
    assert torch.equal(made["gate.bias"], torch.ones(1))
    made["embedding.weight"].zero_()
    assert THEIRS["embed.weight"].any(), "a copy"


@pytest.mark.parametrize(
    ("theirs", "rules", "ours", "what"),
    [
        ({"embed.weight": None}, [], {}, "missing in the source: embed.weight"),
        ({"rotary.inv_freq": torch.ones(2)}, [], {}, "left over in the source: rotary.inv_freq"),
        ({}, [], {"head.weight": torch.empty(1)}, "made by no rule: head.weight"),
        ({}, [Rule("x", ())], {}, "not in the model: x"),
        ({}, [Rule("gate.bias", ())], {}, "made by two rules: gate.bias"),
        ({"embed.weight": torch.ones(4, 5)}, [], {}, r"embedding.weight: \[4, 5\], not \[5, 4\]"),
        ({"layers.3.k.weight": torch.ones(2, 3)}, [], {}, "prelude.0.kv.weight"),
    ],
)
def test_anything_else_is_refused(theirs, rules, ours, what):
    given = {name: x for name, x in (THEIRS | theirs).items() if x is not None}
    with pytest.raises(DataError, match=what):
        renamed(given, RULES + rules, SHAPES | ours, where="folder")


def test_dropped_names_are_not_left_over():
    extra = THEIRS | {"freqs_cis": torch.ones(3)}
    assert renamed(extra, RULES, SHAPES, dropped=["freqs_cis"]).keys() == SHAPES.keys()


def test_half_split_turns_interleaved_rotation_into_ours():
    heads, width = 3, 8
    x = torch.randn(1, 5, 16)
    weight = torch.randn(heads * width, 16)
    table = rope_table(torch.arange(5), width, 100.0)
    theirs = (x @ weight.mT).unflatten(-1, (heads, width // 2, 2))
    turned = torch.view_as_complex(theirs) * torch.complex(*table).unsqueeze(1)
    mine = (x @ names.half_split(width)(weight).mT).unflatten(-1, (heads, width))
    expected = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(apply_rope(mine, table), expected)


def test_the_other_functions():
    x = torch.arange(6.0).view(3, 2)
    assert torch.equal(names.plus_one(x), x + 1)
    assert torch.equal(names.times(0.5)(x), x / 2)
    assert torch.equal(names.rows(1, 3)(x), x[1:])
    assert torch.equal(names.columns(1, 2)(x), x[:, 1:])
