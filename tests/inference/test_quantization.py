"""Quantized models: which weights are rounded, and which calls raise."""

from __future__ import annotations

import copy
import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from helpers import random_ids, randomise, small_config, small_model
from torch import Tensor

from benchmarks.quantized import rounded_twin
from open_mythos import DenseTransformer, KVCache, LoopTrace, OpenMythos, save_pretrained
from open_mythos.cli import main
from open_mythos.errors import ConfigError, EnvironmentError_
from open_mythos.inference.quantization import (
    PackedExperts,
    is_quantized,
    quantize,
    weight_bytes,
)
from open_mythos.model.exit_rules import exit_rule
from open_mythos.model.layers.experts import RoutedExperts
from open_mythos.model.layers.mla import MLAttention
from open_mythos.tokenizer import ByteTokenizer
from open_mythos.variants import variant

WIDTHS = {
    "dim": 64, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 8, "v_head_dim": 16, "expert_dim": 32, "ffn_dim": 90,
}  # fmt: skip
KINDS = ["int8", "int4"]


def built(attn_type: str = "mla", **changes: object) -> OpenMythos:
    """A model with no fewer inputs anywhere than a group of 32 has."""
    return small_model(attn_type, **{**WIDTHS, **changes})


def dense() -> DenseTransformer:
    return randomise(DenseTransformer(small_config("gqa", **WIDTHS), 3)).eval()


def off(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def typical(actual: Tensor, expected: Tensor) -> float:
    """The same of a position, the median over positions: rounding may turn a choice of experts."""
    a, b = actual.float(), expected.float()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).median())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mla", "gqa", "dense"])
@torch.no_grad()
def test_equals_the_model_with_rounded_weights(name, kind):
    model, ids = (dense() if name == "dense" else built(name)), random_ids(2, 24)
    depth = {} if name == "dense" else {"n_loops": 3}
    twin = rounded_twin(model, 0 if kind == "int8" else 32)
    expected, whole = twin(ids, **depth), model(ids, **depth)
    low = copy.deepcopy(twin).bfloat16()(ids, **depth)
    quantized = quantize(model, kind)
    assert quantized is model
    assert typical(quantized(ids, **depth), expected) < 1.5 * typical(low, expected)
    # what was rounded matters: int4 is far from the model as it was
    assert kind == "int8" or typical(quantized(ids, **depth), whole) > 3 * typical(low, expected)


def test_what_is_rounded_and_what_is_not():
    model = built("mla", tie_embeddings=True)
    before = {name: value.clone() for name, value in model.named_parameters()}
    quantize(model, "int4")
    after = dict(model.named_parameters())
    gone = {name for name in before if name not in after}
    assert gone == {
        name
        for name in before
        if name.startswith(("prelude.", "coda.", "recurrent.blocks."))
        and "norm" not in name
        and not name.endswith(("kv_up.weight", "router.weight"))
    }
    exact = {"router.weight", "log_A", "dt_bias", "gate.weight", "gate.bias"}
    for name, value in after.items():
        assert not value.requires_grad
        if name.split("recurrent.")[-1].endswith(tuple(exact)):
            assert value.dtype == torch.float32
            assert torch.equal(value, before[name])
        else:
            assert torch.equal(value, before[name].bfloat16())
    assert model.head.weight is model.embedding.weight
    assert model.recurrent.injection.spectral_radius() < 1
    assert not model.training


def test_the_router_decides_as_before():
    model = built()
    ffn, x = model.recurrent.blocks[0].ffn, torch.randn(50, 64)
    expected = ffn.route(x)
    quantize(model, "int4")
    assert isinstance(ffn.experts, PackedExperts)
    for got, wanted in zip(ffn.route(x), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_chunked_and_batched_are_the_same(attn_type, kind):
    model, ids = quantize(built(attn_type), kind), random_ids(2, 20)
    whole = model(ids, n_loops=3)
    for width in (1, 7):
        cache = KVCache()
        parts = [
            model(ids[:, i : i + width], n_loops=3, kv_cache=cache, start_pos=i)
            for i in range(0, 20, width)
        ]
        assert typical(torch.cat(parts, 1), whole) < 0.03
    alone = torch.cat([model(row.unsqueeze(0), n_loops=3) for row in ids])
    assert typical(alone, whole) < 0.03
    other = model(ids.flip(1), n_loops=3)
    assert typical(other, whole) > 0.5


@torch.no_grad()
def test_absorbed_equals_expanded():
    model = quantize(built("mla"), "int8")
    attention = model.recurrent.blocks[0].attn
    assert isinstance(attention, MLAttention)
    ctx = model.context(random_ids(1, 6))
    x = torch.randn(1, 6, 64).bfloat16()
    q, entry = attention.query(x, ctx.rope), attention.entry(x, ctx.rope)
    ways = [attend(q, entry, ctx) for attend in (attention.absorbed, attention.expanded)]
    assert off(*ways) < 0.03


@torch.no_grad()
def test_exits_traces_and_generation_work():
    model, trace = quantize(built("gqa"), "int8"), LoopTrace()
    model(random_ids(2, 9), n_loops=8, exit_rule=exit_rule("change:0.5", model), trace=trace)
    assert 1 <= trace.exits.min() <= trace.exits.max() <= 8
    out = model.generate(random_ids(2, 5), 4, n_loops=2, temperature=0)
    again = copy.deepcopy(model).generate(random_ids(2, 5), 4, n_loops=2, temperature=0)
    assert torch.equal(out, again)


REFUSED = {
    "unknown kind": (("int2",), {}, "unknown quantization"),
    "unknown group": (("int4",), {"group_size": 48}, "unknown group size"),
    "a bool": (("int4",), {"group_size": True}, "group_size"),
    "int8 has no groups": (("int8",), {"group_size": 32}, "no groups"),
    "unknown backend": (("int8",), {"backend": "cutlass"}, "unknown backend"),
    "too wide a group": (("int4",), {"group_size": 64}, r"prelude\.0\.attn\.q_up\.weight\n"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_rejected_call_changes_nothing(case):
    arguments, options, said = REFUSED[case]
    model = built()
    before = copy.deepcopy(model.state_dict())
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ConfigError, match=said):
        quantize(model, *arguments, **options)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert any(trained)


def test_weights_that_cannot_be_rounded_are_named():
    model = built("gqa", expert_dim=20, n_shared_experts=0)
    with pytest.raises(ConfigError, match=r"recurrent\.blocks\.0\.ffn\.down\n") as caught:
        quantize(model, "int4")
    assert "groups of 32 for 20 inputs" in str(caught.value)
    quantize(model, "int8")  # every width serves
    broken = built("gqa")
    broken.coda[0].ffn.down.weight.data[3, 5] = torch.nan
    with pytest.raises(ConfigError, match=r"not finite\n.*coda\.0\.ffn\.down\.weight"):
        quantize(broken, "int8")
    assert not is_quantized(broken)
    for name in ("head.weight", "final_norm.weight", "recurrent.injection.log_A"):
        broken = built("gqa")
        broken.get_parameter(name).data.view(-1)[0] = torch.inf
        with pytest.raises(ConfigError, match=rf"not finite\n.*{name}"):
            quantize(broken, "int8")
    own = built("gqa")
    own.recurrent.blocks[0].ffn.experts = type("MyExperts", (RoutedExperts,), {})()
    with pytest.raises(ConfigError, match="MyExperts"):
        quantize(own, "int8")
    with torch.device("meta"), pytest.raises(ConfigError, match="not a whole tensor"):
        quantize(OpenMythos(small_config("gqa")), "int8")


def test_a_quantized_model_is_rejected_where_unsupported(tmp_path):
    model, ids = quantize(built("gqa"), "int8"), random_ids(1, 4)
    with pytest.raises(ConfigError, match="quantized already"):
        quantize(model, "int4")
    with pytest.raises(ConfigError, match="no gradients"):
        model.train()(ids)
    model.eval()
    model.embedding.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match="no gradients"):
        model(ids)
    with torch.no_grad():
        model(ids)
    with pytest.raises(ConfigError, match="cannot be saved"):
        save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="cannot be saved"):
        quantize(dense(), "int8").state_dict()


@torch.no_grad()
def test_torchao_gives_the_same():
    pytest.importorskip("torchao")
    model, ids = built("mla"), random_ids(1, 6)
    ours = quantize(copy.deepcopy(model), "int8")
    theirs = quantize(copy.deepcopy(model), "int8", backend="torchao")
    assert is_quantized(theirs)
    expected = rounded_twin(model, 0)(ids, n_loops=2)
    assert typical(theirs(ids, n_loops=2), expected) < 3 * typical(ours(ids, n_loops=2), expected)
    sizes = [weight_bytes(each) for each in (ours, theirs)]
    assert sizes[0].stored < sizes[1].stored < 1.1 * sizes[0].stored  # its scales are float32
    with pytest.raises(ConfigError, match="cannot be saved"):
        theirs.state_dict()
    with pytest.raises(EnvironmentError_, match="no int4 kernel for this device"):
        quantize(model, "int4", backend="torchao")
    assert not is_quantized(model)


def test_a_missing_torchao_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    model = built("gqa")
    with pytest.raises(EnvironmentError_, match=r"open-mythos\[quant\]"):
        quantize(model, "int8", backend="torchao")
    assert not is_quantized(model)
    quantize(model, "int8")


def test_bytes(attn_type):
    model = built(attn_type)
    before = weight_bytes(model)
    numbers = [*model.parameters(), *model.buffers()]
    assert before.stored == sum(value.nbytes for value in numbers)
    cfg, loop = model.cfg, model.recurrent
    block = sum(value.nbytes for value in loop.blocks.parameters())
    block += sum(value.nbytes for value in loop.blocks.buffers())
    ffn = loop.blocks[0].ffn
    idle = 1 - cfg.n_experts_per_tok / cfg.n_experts
    expected = block - idle * (ffn.gate_up.nbytes + ffn.down.nbytes)
    expected += (loop.lora.down.nbytes + loop.lora.up.nbytes) / cfg.max_loop_iters
    expected += loop.lora_norm.weight.nbytes + loop.injection.log_A.nbytes * 2
    assert before.per_loop == pytest.approx(expected, abs=1)
    whole = before.stored - model.embedding.weight.nbytes * (1 - 1 / cfg.vocab_size)
    halting = sum(value.nbytes for value in loop.halting.parameters())
    in_loop = block + loop.lora.down.nbytes + loop.lora.up.nbytes + loop.lora_norm.weight.nbytes
    once = whole - in_loop - halting - 2 * loop.injection.log_A.nbytes
    assert before.once == pytest.approx(once, abs=1)
    assert before.per_token(5) == before.once + 5 * before.per_loop
    sizes = [before, *(weight_bytes(quantize(copy.deepcopy(model), kind)) for kind in KINDS)]
    for larger, smaller in pairwise(sizes):
        assert smaller.stored < larger.stored
        assert smaller.per_loop < larger.per_loop
    assert sizes[1].per_loop < before.per_loop / 3  # float32 to 8 bits, but for what is left out
    assert weight_bytes(dense()).per_loop == 0


def test_what_stays_is_little():
    """The shares that docs/quantization.md tells."""
    with torch.device("meta"):
        model = OpenMythos(variant("1b")).bfloat16()
    found = weight_bytes(model)
    kv_up = model.recurrent.blocks[0].attn.kv_up.weight.nbytes
    assert kv_up / found.per_loop == pytest.approx(0.003, abs=5e-4)
    head = model.head.weight.nbytes
    assert head / found.per_token(model.cfg.max_loop_iters) == pytest.approx(0.025, abs=5e-4)


def test_tied_weights_count_once():
    tied, free = (weight_bytes(built("gqa", tie_embeddings=tie)) for tie in (True, False))
    assert free.stored - tied.stored == 61 * 64 * 4
    assert tied.once == free.once  # the head is read whole either way


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of bytes in a run that names its shards."""
    base = tmp_path_factory.mktemp("quantized")
    (base / "text").mkdir()
    for i in range(4):
        (base / "text" / f"{i}.txt").write_text(f"file {i}: " + "to be or not to be\n" * 40)
    prepare = ["data", "prepare", str(base / "text"), str(base / "shards"), "--quiet"]
    assert main([*prepare, "--val-fraction", "0.4"]) == 0
    folder, tok = base / "run", ByteTokenizer()
    save_pretrained(built("gqa", vocab_size=tok.vocab_size), folder / "checkpoints" / "step_4")
    tok.save(folder / "tokenizer")
    (folder / "run.yaml").write_text(yaml.safe_dump({"data": {"path": str(base / "shards")}}))
    return folder


def test_on_the_command_line(run_folder, tmp_path, capsys):
    losses = {}
    for how in ("", "int8", "int4:32"):
        out = tmp_path / f"{how[:4]}.json"
        options = ["--quantize", how] if how else []
        command = ["evaluate", str(run_folder), "--depths", "[1,4]", "--windows", "4"]
        assert main([*command, "--seq_len", "32", "--quiet", "--out", str(out), *options]) == 0
        content = json.loads(out.read_text())
        assert content.get("quantize", "") == how
        losses[how] = [row["loss"] for row in content["depths"]]
    for exact, int8, int4 in zip(*losses.values(), strict=True):
        assert abs(int8 - exact) < 0.05 * exact
        assert abs(int4 - exact) < 0.3 * exact
        assert exact != int8 != int4
    capsys.readouterr()
    command = ["generate", str(run_folder), "to be", "--max_new_tokens", "3", "--quiet"]
    assert main([*command, "--quantize", "int8"]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("how", "said"),
    [("int3", "unknown quantization"), ("int4:x", "not a group size"), ("int8:32", "no groups")],
)
def test_mistakes_on_the_command_line(run_folder, capsys, how, said):
    assert main(["generate", str(run_folder), "to", "--quantize", how]) == ConfigError.exit_code
    assert said in capsys.readouterr().err
