"""Moves and values at the edge of the model: refused in words, or right."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_same, random_ids, small_model
from safetensors.torch import load_file, save_file

from open_mythos import Depth, FixedDepth, from_pretrained, save_pretrained
from open_mythos.errors import ConfigError, DataError
from open_mythos.inference.quantization import quantize
from open_mythos.model import generation
from open_mythos.model.layers.halting import halting_weights
from open_mythos.ops import finite
from open_mythos.ops.sampling import SamplingParams

IDS = random_ids(2, 6)


def test_a_fixed_depth_may_exceed_the_trained_one():
    assert Depth(None, FixedDepth(9)).most(4) == 9
    assert Depth(5, FixedDepth(9)).most(4) == 5
    assert Depth().most(4) == 4
    model = small_model()
    with torch.no_grad():
        assert_same(model(IDS, exit_rule=FixedDepth(7)), model(IDS, 7))


@pytest.mark.parametrize("mode", ["eager", "static"])
@pytest.mark.parametrize("on_device", [False, True])
def test_no_token_is_chosen_of_logits_that_are_not_finite(mode, on_device, monkeypatch):
    model = small_model()
    if on_device:  # where no step may wait for a value
        for module in (generation, finite):
            monkeypatch.setattr(module, "is_readable", lambda _: False)
    with torch.no_grad():
        model.head.weight[3] = math.nan
    for temperature in (0.0, 0.8):
        with pytest.raises(ConfigError, match="not finite"):
            model.generate(IDS, 2, temperature=temperature, mode=mode)


def test_a_row_is_not_chosen_from_nothing():
    logits = torch.full((2, 5), -math.inf)
    with pytest.raises(ConfigError, match="not finite"):
        SamplingParams().choose(logits, IDS[:2], torch.zeros(2, dtype=torch.int64), 0)


@pytest.mark.parametrize("speed", [math.nan, math.inf, -1.0])
def test_the_bias_stays_finite(speed):
    model = small_model()
    with pytest.raises(ConfigError, match="speed"):
        model.recurrent.blocks[0].ffn.update_bias(torch.ones(8), speed)


@pytest.mark.parametrize("depth", [0, 4, torch.tensor([1, 4]), torch.tensor([0, 2])])
def test_halting_weights_of_loops_that_did_not_run(depth):
    with pytest.raises(ConfigError, match="that many loops"):
        halting_weights(torch.full((3, 2), 0.3), depth)
    sums = halting_weights(torch.full((3, 2), 0.3), torch.tensor([1, 3])).sum(0)
    torch.testing.assert_close(sums, torch.ones(2))


def test_weights_of_several_dtypes(tmp_path):
    save_pretrained(small_model(), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["head.weight"] = tensors["head.weight"].bfloat16()
    save_file(tensors, file)
    with pytest.raises(DataError, match="several dtypes"):
        from_pretrained(tmp_path)
    model = from_pretrained(tmp_path, dtype=torch.float32)
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    # these compute in float32 whatever the others are
    tensors = {name: each.bfloat16() for name, each in tensors.items()}
    tensors["recurrent.injection.log_A"] = tensors["recurrent.injection.log_A"].float()
    save_file(tensors, file)
    assert from_pretrained(tmp_path).head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("move", [lambda m: m.float(), lambda m: m.to(torch.float16)])
def test_a_quantized_model_keeps_its_dtype(move):
    model = quantize(small_model(), "int8")
    want = model.generate(IDS, 2, temperature=0.0)
    with pytest.raises(ConfigError, match="one dtype"):
        move(model)
    assert model.embedding.weight.dtype == torch.bfloat16, "nothing was moved"
    assert torch.equal(model.to("cpu").bfloat16().generate(IDS, 2, temperature=0.0), want)


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_can_grow(tmp_path, tied):
    model = small_model(tie_embeddings=tied)
    size = model.cfg.vocab_size
    with torch.no_grad():
        before = model(IDS)
        model.resize_vocabulary(size + 3)
        after = model(IDS)
    assert_same(after[..., :size], before)
    new = IDS.clone()
    new[:, -1] = size + 2
    loss = model(new).logsumexp(-1).mean()
    loss.backward()
    assert model.embedding.weight.grad[size + 2].any()
    assert (model.head.weight is model.embedding.weight) == tied
    save_pretrained(model, tmp_path)
    with torch.no_grad():
        assert_same(from_pretrained(tmp_path)(new), model(new))
        model.resize_vocabulary(size)
        assert_same(model(IDS), before)
    with pytest.raises(ConfigError, match="vocab_size"):
        model.resize_vocabulary(0)


def test_packed_weights_of_another_library():
    torchao = pytest.importorskip("torchao.quantization")
    model = small_model("mla")
    with torch.no_grad():
        want = model(IDS, 2)
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        found = model(IDS, 2)
        assert (found - want).norm() < 0.1 * want.norm()
        out = model.generate(IDS, 3, 2, temperature=0.0)
    assert out.shape[1] == IDS.shape[1] + 3
