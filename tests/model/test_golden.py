"""Fixed numbers: outputs and parameters of a model do not change unnoticed.

Weights are fractions made of integers alone, so no random generator of a library is involved. The
expected logits were computed in float64; float32 is within 2e-4 of them, and the tolerance leaves
room for kernels of other machines.
"""

from __future__ import annotations

import hashlib

import pytest
import torch
from helpers import ATTENTION_TYPES, small_config

from open_mythos import OpenMythos
from open_mythos.ops.random import counter_uniform

TOLERANCE = 1e-3
LOGITS = {
    ("mla", 1): [-0.5028, 0.1135, 0.1988, -0.752, 1.7992, 0.1119],
    ("mla", 9): [1.8159, -1.0795, -1.6348, 2.9139, 0.9502, -0.7782],
    ("gqa", 1): [-1.7703, 0.178, -2.6081, 1.9117, -1.1304, -1.9802],
    ("gqa", 9): [-0.5963, -2.541, 0.9343, -0.1856, -1.1579, -1.1157],
}
NAMES_AND_SHAPES = {
    "mla": "a7165411669551d2df34402eb229ea3e28adcc8d034cfce6fb0e815bf91d0af6",
    "gqa": "b1e952cf9266abbe5b99f81e65e338fe4933ee932b4ad10a2f0f85c93eae2754",
}


@torch.no_grad()
def integer_model(attn_type: str) -> OpenMythos:
    """Every parameter from the counter-based generator, moved by its own start."""
    model = OpenMythos(small_config(attn_type, recurrent_layers=2)).eval()
    for i, (name, value) in enumerate(sorted(model.named_parameters())):
        key = torch.tensor([i])
        noise = counter_uniform(key, torch.arange(value.numel()), 1, 0).view(value.shape) - 0.5
        start = value if value.dim() == 1 or name.endswith(("readout.weight", "injection.B")) else 0
        start = 0 if "gate.bias" in name else start
        value.copy_(start + noise)
    return model


@pytest.mark.parametrize("n_loops", [1, 9])
@pytest.mark.parametrize("attn_type", ATTENTION_TYPES)
def test_logits(attn_type, n_loops):
    ids = torch.tensor([[3, 14, 15, 9, 26, 53, 58]])
    with torch.no_grad():
        logits = integer_model(attn_type)(ids, n_loops)[0, -1, :6].tolist()
    assert logits == pytest.approx(LOGITS[attn_type, n_loops], abs=TOLERANCE)


@pytest.mark.parametrize("attn_type", ATTENTION_TYPES)
def test_names_and_shapes(attn_type):
    """What a checkpoint holds: a change here makes older checkpoints unreadable."""
    state = OpenMythos(small_config(attn_type)).state_dict()
    text = "\n".join(f"{name} {tuple(value.shape)}" for name, value in sorted(state.items()))
    assert hashlib.sha256(text.encode()).hexdigest() == NAMES_AND_SHAPES[attn_type], text
