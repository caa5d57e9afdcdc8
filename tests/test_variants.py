"""Named configurations: published sizes and parameter counts."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from helpers import ATTENTION_TYPES, random_ids, small_config, small_model

import open_mythos
from open_mythos import ConfigError, KVCache, OpenMythos, cache_bytes, variant
from open_mythos.model.dense import parameter_count
from open_mythos.variants import VARIANTS

# name: (size in the name, all parameters, those that one token uses at full depth)
PARAMETERS = {
    "nano": (0.37e6, 374_081, 374_081),
    "tiny": (2.0e6, 2_010_433, 2_010_433),
    "small": (116e6, 116_126_977, 116_126_977),
    "1b": (1e9, 1_072_910_081, 317_935_361),
    "3b": (3e9, 3_159_643_777, 894_719_617),
    "7b": (7e9, 7_154_228_737, 1_303_174_657),
    "10b": (10e9, 10_148_961_793, 1_567_415_809),
    "50b": (50e9, 50_658_547_713, 5_473_310_721),
    "100b": (100e9, 99_973_945_857, 17_279_048_193),
    "500b": (500e9, 499_527_782_401, 71_457_116_161),
    "1t": (1e12, 1_002_030_105_601, 145_888_773_121),
}

# name: dim, experts, expert_dim, loops, context, longest output
PUBLISHED = {
    "1b": (2048, 64, 2048, 16, 4096, 4096),
    "3b": (3072, 64, 4096, 16, 4096, 4096),
    "10b": (4096, 128, 5632, 24, 8192, 4096),
    "50b": (6144, 256, 9728, 32, 8192, 4096),
    "100b": (8192, 256, 13568, 32, 1_000_000, 131_072),
    "500b": (12288, 512, 23040, 48, 1_000_000, 131_072),
    "1t": (16384, 512, 34560, 64, 1_000_000, 131_072),
}

names = pytest.mark.parametrize("name", VARIANTS)


@cache
def skeleton(name: str) -> OpenMythos:
    """The model without its memory."""
    with torch.device("meta"):
        return OpenMythos(variant(name))


@names
def test_total_parameters(name):
    named, total, _ = PARAMETERS[name]
    assert parameter_count(skeleton(name)) == total
    assert total == pytest.approx(named, rel=0.1)


@names
def test_active_parameters(name):
    cfg, (_, total, active) = variant(name), PARAMETERS[name]
    weights = expert_weights(skeleton(name)) if cfg.n_experts else []
    expert = sum(parameter.numel() for parameter in weights) // max(1, cfg.n_experts)
    idle = max(0, cfg.n_experts - cfg.n_experts_per_tok)
    assert total - idle * expert == active


def expert_weights(model: OpenMythos) -> list[torch.nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.endswith(("ffn.gate_up", "ffn.down"))]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_table(name):
    cfg = variant(name)
    assert PUBLISHED[name] == (
        cfg.dim, cfg.n_experts, cfg.expert_dim, cfg.max_loop_iters, cfg.max_seq_len,
        cfg.max_output_tokens,
    )  # fmt: skip


@names
def test_every_variant_is_latent_attention_with_a_latent_cache(name):
    """Of a token, layer and loop the cache keeps a latent and one rotary key for all heads."""
    cfg = variant(name)
    assert cfg.attn_type == "mla"
    assert cfg.cache_width == cfg.kv_lora_rank + cfg.qk_rope_head_dim
    assert cache_bytes(cfg, 1, 1, element_size=1) == cfg.cache_width * (
        cfg.prelude_layers + cfg.recurrent_layers + cfg.coda_layers
    )


@names
def test_measured_cache_of_a_scaled_down_variant(name):
    """The variant's own attention widths, in a model small enough to run."""
    cfg, tokens, loops = variant(name), 3, 2
    small = small_config(
        "mla", kv_lora_rank=cfg.kv_lora_rank, qk_rope_head_dim=cfg.qk_rope_head_dim,
        prelude_layers=cfg.prelude_layers, recurrent_layers=cfg.recurrent_layers,
        coda_layers=cfg.coda_layers,
    )  # fmt: skip
    held = KVCache(capacity=tokens)
    OpenMythos(small)(random_ids(2, tokens), loops, held)
    assert held.nbytes == cache_bytes(cfg, loops, tokens, batch=2, element_size=4)


@pytest.mark.parametrize("attn_type", ATTENTION_TYPES)
def test_formula_against_a_measured_cache(attn_type):
    model, held = small_model(attn_type), KVCache(capacity=7)
    model(random_ids(2, 7), 5, held)
    assert held.nbytes == cache_bytes(model.cfg, 5, 7, batch=2, element_size=4)


@names
def test_functions_and_names(name):
    cfg = getattr(open_mythos, f"mythos_{name}")()
    cfg.validate()
    assert cfg == variant(name) == variant(f"mythos_{name}")
    assert cfg is not variant(name)


def test_unknown_variant_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean '100b'"):
        variant("mythos_1000b")


@pytest.mark.parametrize("name", ["nano", "tiny"])
def test_small_ones_run(name):
    model = OpenMythos(variant(name))
    assert model(random_ids(1, 8), n_loops=2).shape == (1, 8, model.cfg.vocab_size)
