"""The block: its equation, and its precision."""

from __future__ import annotations

import pytest
import torch
from helpers import randomise, small_config

from open_mythos import MoEFFN, TransformerBlock


@pytest.mark.parametrize("use_moe", [False, True])
def test_equation(attn_type, use_moe):
    block = randomise(TransformerBlock(small_config(attn_type), use_moe))
    assert isinstance(block.ffn, MoEFFN) == use_moe
    x = torch.randn(2, 5, 32)
    middle = x + block.attn(block.attn_norm(x))
    torch.testing.assert_close(block(x), middle + block.ffn(block.ffn_norm(middle)))


def test_dense_width(attn_type):
    block = TransformerBlock(small_config(attn_type, ffn_dim=13))
    assert block.ffn.down.in_features == 13


def test_float32_stream_through_a_bfloat16_block(attn_type):
    block = randomise(TransformerBlock(small_config(attn_type), use_moe=True)).bfloat16()
    assert block(torch.randn(2, 5, 32)).dtype == torch.float32
    assert block(torch.randn(2, 5, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_standalone_dropout_needs_no_context(attn_type):
    block = randomise(TransformerBlock(small_config(attn_type, dropout=0.5))).train()
    x = torch.randn(2, 5, 32)
    assert not torch.equal(block(x), block(x))
    assert torch.equal(block.eval()(x), block(x))
