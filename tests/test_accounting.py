"""Counts against built models, FLOPs against PyTorch's own counter."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from open_mythos.accounting import account
from open_mythos.config import MythosConfig
from open_mythos.errors import ConfigError
from open_mythos.model.cache import KVCache, cache_bytes
from open_mythos.model.dense import DenseTransformer, parameter_count
from open_mythos.model.mythos import OpenMythos
from open_mythos.variants import VARIANTS, variant

# no two widths equal that could be mistaken for one another
BASE = MythosConfig(
    vocab_size=61, dim=48, n_heads=4, n_kv_heads=2, max_seq_len=64, max_loop_iters=3,
    prelude_layers=1, coda_layers=2, kv_lora_rank=20, q_lora_rank=14, qk_rope_head_dim=6,
    qk_nope_head_dim=8, v_head_dim=10, n_experts=8, n_shared_experts=2, n_experts_per_tok=3,
    expert_dim=17, lora_rank=5, attn_backend="reference", moe_backend="reference",
)  # fmt: skip
CHANGES = {
    "mla": {},
    "gqa": {"attn_type": "gqa"},
    "direct query": {"q_lora_rank": 0},
    "no experts": {"n_experts": 0},
    "no shared experts": {"n_shared_experts": 0},
    "bare": {
        "lora_rank": 0, "readout": False, "prelude_norm": False, "injection_matrix": "diagonal",
        "prelude_layers": 0, "coda_layers": 0,
    },
    "two blocks in the loop": {"recurrent_layers": 2, "ffn_dim": 31},
    "tied": {"tie_embeddings": True},
}  # fmt: skip
CONFIGS = {name: replace(BASE, **changes) for name, changes in CHANGES.items()}


def on_meta(build):
    with torch.device("meta"):
        return build()


def parts_of(model: OpenMythos) -> dict[str, int]:
    """Parameters by part, grouped by the names that the model gives them."""
    homes = {
        "embedding": ("embedding.",),
        "prelude": ("prelude.", "prelude_norm."),
        "recurrent": ("recurrent.",),
        "coda": ("readout.", "coda."),
        "head": ("final_norm.", "head."),
    }
    return {
        part: sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefixes))
        for part, prefixes in homes.items()
    }


def flops_of(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.arange(batch * tokens).view(batch, tokens) % BASE.vocab_size


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_hold_what_is_counted(name):
    model = on_meta(lambda: OpenMythos(variant(name)))
    counted = account(variant(name))
    assert counted.stored == parts_of(model)
    assert counted.parameters == parameter_count(model)
    stacked = [p for p in model.recurrent.blocks.parameters() if p.dim() == 3]
    idle = sum(p[model.cfg.n_experts_per_tok :].numel() for p in stacked)
    assert counted.active_parameters == parameter_count(model) - idle


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_of_every_kind_of_model(name):
    model = on_meta(lambda: OpenMythos(CONFIGS[name]))
    assert account(CONFIGS[name]).stored == parts_of(model)
    assert account(model) == account(CONFIGS[name])


@pytest.mark.parametrize("name", ["mla", "gqa", "tied", "direct query"])
def test_dense_models(name):
    model = on_meta(lambda: DenseTransformer(CONFIGS[name], 5, ffn_dim=29))
    counted = account(model)
    assert counted.parameters == counted.active_parameters == parameter_count(model)
    assert counted == account(model.cfg, n_layers=5)
    blocks = sum(p.numel() for key, p in model.named_parameters() if key.startswith("blocks."))
    assert counted.stored["blocks"] == blocks


def test_active_parameters_grow_with_the_adapters_that_run():
    one, two, many = (account(BASE, n_loops=n).active_parameters for n in (1, 2, 100))
    assert two - one == 2 * BASE.dim * BASE.lora_rank
    assert many == account(BASE, n_loops=BASE.max_loop_iters).active_parameters


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("n_loops", [1, 4])
def test_forward_flops_are_those_that_torch_counts(name, n_loops):
    model = OpenMythos(CONFIGS[name]).eval()
    counted = flops_of(lambda: model(ids(2, 9), n_loops=n_loops))
    # the plain attention computes all T scores of a query; a context of 2T - 1 means T on average
    assert 2 * 9 * account(model).forward_flops(n_loops, context=2 * 9 - 1) == counted


@pytest.mark.parametrize("name", ["mla", "gqa"])
def test_dense_forward_flops(name):
    model = DenseTransformer(CONFIGS[name], 3).eval()
    counted = flops_of(lambda: model(ids(2, 9)))
    assert 18 * account(model).forward_flops(context=17) == counted
    assert account(model).forward_flops(7) == account(model).forward_flops(1)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("grad_loops", [None, 1, 2])
def test_training_flops_are_those_that_torch_counts(name, grad_loops):
    model = OpenMythos(CONFIGS[name])
    counted = flops_of(lambda: model(ids(2, 9), n_loops=4, grad_loops=grad_loops).sum().backward())
    assert 18 * account(model).training_flops(4, grad_loops, context=17) == counted


@pytest.mark.parametrize("context", [1, 4, 5, 9])
def test_windows_count_what_a_token_sees(context):
    own = {"0": {"window": 4}, "1": {"window": 2}, "3": {"window": 8}}
    plain, few = account(BASE), account(replace(BASE, layer_overrides=own, attn_type="mla"))
    per_position = plain.forward_flops(1, 3) - plain.forward_flops(1, 1)  # 4 blocks, one more
    seen = sum(min(i, w) for w in (4, 2, context, 8) for i in range(1, context + 1)) / context
    without = plain.forward_flops(1, 1) - per_position
    assert few.forward_flops(1, context) == pytest.approx(without + per_position / 4 * seen)
    decode = plain.decode_flops(1, 2) - plain.decode_flops(1, 1)
    seen = sum(min(context, w) for w in (4, 2, context, 8))
    without = plain.decode_flops(1, 1) - decode
    assert few.decode_flops(1, context) == without + decode / 4 * seen


@pytest.mark.parametrize("name", ["mla", "gqa", "direct query", "two blocks in the loop"])
def test_decode_flops_are_those_that_torch_counts(name):
    model, cache = OpenMythos(CONFIGS[name]).eval(), KVCache()
    model(ids(2, 30), n_loops=4, kv_cache=cache)
    counted = flops_of(lambda: model(ids(2, 1), n_loops=4, kv_cache=cache, start_pos=30))
    assert 2 * account(model).decode_flops(4, context=31) == counted


def test_a_mean_depth_is_between_whole_ones():
    counted = account(BASE, context=16)
    for flops in (counted.forward_flops, counted.training_flops, counted.decode_flops):
        assert flops(2.5) == (flops(2) + flops(3)) / 2
    assert counted.training_flops(4, grad_loops=9) == counted.training_flops(4)


@pytest.mark.parametrize("share", ["none", "last"])
@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_cache_bytes_are_those_held(attn_type, share):
    cfg = replace(BASE, attn_type=attn_type, kv_share=share)
    model, cache = OpenMythos(cfg).eval(), KVCache(share_loops=share == "last")
    model(ids(2, 7), n_loops=5, kv_cache=cache)
    held = 2 * 7 * account(cfg).cache_bytes(5, element_size=4)
    assert held == cache.nbytes == cache_bytes(cfg, 5, 7, batch=2, element_size=4)


@pytest.mark.parametrize(
    "arguments",
    [{"n_loops": 0}, {"n_loops": True}, {"n_loops": 2.5}, {"context": 0}, {"n_layers": 0}],
)
def test_bad_numbers_are_rejected(arguments):
    with pytest.raises(ConfigError, match="an integer"):
        account(BASE, **arguments)


def test_bad_configurations_are_rejected():
    with pytest.raises(ConfigError, match="dim"):
        account(replace(BASE, dim=0))


def test_result_is_json():
    values = json.loads(json.dumps(account(BASE).to_dict()))
    assert values["parameters"] == account(BASE).parameters
