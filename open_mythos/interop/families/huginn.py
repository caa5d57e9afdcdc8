"""Huginn-0125 (arXiv 2502.05171): prelude, a core looped on random states, coda.

    e = prelude(sqrt(d) embedding(ids));  h_t+1 = core(W [h_t; e])
    logits = head(norm(coda(norm(h_n))))

Blocks are sandwiched: norms of the input of each branch and of the sum after it. Queries and keys
have biases, and are rotated in interleaved pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.errors import DataError
from open_mythos.interop.families.plan import (
    Family,
    Fields,
    Plan,
    attention_sizes,
    blocks,
    looped,
    tied_head,
    untrained_gate,
)
from open_mythos.interop.names import Rule, columns, half_split, per_block
from open_mythos.interop.read import Source
from open_mythos.ops.rope import rope_table

_NORMS = {"norm_1": "attn_norm", "norm_2": "attn_sum_norm", "norm_3": "ffn_norm",
          "norm_4": "ffn_sum_norm"}  # fmt: skip
_STATED = {
    "injection_type": ("linear",), "block_class_name": ("SandwichBlock",),
    "mlp_class_name": ("GatedMLP",), "nonlin_name": ("SiLU",),
    "norm_class_name": ("RMSNorm_llama", "RMSNorm"), "state_init": ("like-init",), "bias": (False,),
    "test_time_noise": (0,),
}  # fmt: skip


def plan(source: Source) -> Plan:
    """Return the plan of a Huginn checkpoint."""
    fields = Fields("Huginn", source.config)
    fields.only(_STATED)
    fields.only({"qk_bias": (True,), "tie_embeddings": (True,), "tie_word_embeddings": (True,)})
    dim, heads = fields.count("n_embd"), fields.count("n_heads", "num_attention_heads")
    fields.only({"num_key_value_heads": (heads,)})
    scales = fields.part("init_values")
    std = scales.number("std", default=math.sqrt(2 / (5 * dim)))
    scale = scales.number("embed_scale", default=math.sqrt(dim))
    cfg = looped(
        fields, **attention_sizes(dim, heads, heads, dim // heads),
        vocab_size=fields.count("padded_vocab_size", "vocab_size"),
        ffn_dim=fields.count("intermediate_size"), norm_eps=fields.number("norm_eps"),
        rope_theta=fields.number("rope_base"), max_seq_len=fields.count("block_size"),
        max_loop_iters=fields.count("mean_recurrence"),
        prelude_layers=fields.layers("n_layers_in_prelude", least=0),
        recurrent_layers=fields.layers("n_layers_in_recurrent_block"),
        coda_layers=fields.layers("n_layers_in_coda", least=0), qkv_bias=True, injection="concat",
        initial_state="normal", initial_state_std=std * scale, embedding_scale=scale,
        state_norm="exit", block_norms="in+sum", tie_embeddings=True,
    )  # fmt: skip
    names = [
        f"transformer.{part}.{i}"
        for part, count in (
            ("prelude", cfg.prelude_layers), ("core_block", cfg.recurrent_layers),
            ("coda", cfg.coda_layers),
        )
        for i in range(count)
    ]  # fmt: skip
    adapter = ("transformer.adapter.weight",)
    rules = [
        Rule("embedding.weight", ("transformer.wte.weight",)),
        Rule("final_norm.weight", ("transformer.ln_f.weight",)),
        Rule("recurrent.injection.A", adapter, columns(0, dim)),
        Rule("recurrent.injection.B", adapter, columns(dim, 2 * dim)),
        *per_block(_block(dim, cfg.head_dim), zip(blocks(cfg), names, strict=True)),
        *untrained_gate(dim),
    ]
    dropped = tied_head(source, "transformer.wte.weight") | _rotary(source, cfg)
    return Plan(cfg, rules, dropped)


def _block(dim: int, head_dim: int) -> list[Rule]:
    turn = half_split(head_dim)

    def keys_and_values(qkv: Tensor) -> Tensor:
        return torch.cat((turn(qkv[dim : 2 * dim]), qkv[2 * dim :]))

    def key_bias(bias: Tensor) -> Tensor:
        key = turn(bias[1].flatten())
        return torch.cat((key, torch.zeros_like(key)))

    qkv, bias = ("{i}.attn.Wqkv.weight",), ("{i}.attn.qk_bias",)
    return [
        Rule("{block}.attn.q_proj.weight", qkv, lambda x: turn(x[:dim])),
        Rule("{block}.attn.kv_proj.weight", qkv, keys_and_values),
        Rule("{block}.attn.q_proj.bias", bias, lambda x: turn(x[0].flatten())),
        Rule("{block}.attn.kv_proj.bias", bias, key_bias),
        Rule("{block}.attn.out_proj.weight", ("{i}.attn.proj.weight",)),
        Rule("{block}.ffn.gate_up.weight", ("{i}.mlp.fc.weight",)),
        Rule("{block}.ffn.down.weight", ("{i}.mlp.proj.weight",)),
        *(Rule(f"{{block}}.{o}.weight", (f"{{i}}.{t}.weight",)) for t, o in _NORMS.items()),
    ]


def _rotary(source: Source, cfg: MythosConfig) -> dict[str, str]:
    """Drop the stored rotary table, if it is the one of the configuration."""
    if "freqs_cis" not in source.tensors:
        return {}
    stored = source.tensors["freqs_cis"].float()
    if stored.dim() == 5:
        table = rope_table(torch.arange(stored.shape[1]), cfg.head_dim, cfg.rope_theta)
        expected = torch.stack(tuple(table), -1).view(1, -1, 1, cfg.head_dim // 2, 2)
    # stored angles are float32 products: off by up to a position's rounding
    if (
        stored.dim() != 5
        or stored.shape != expected.shape
        or (stored - expected).abs().max() > 1e-2
    ):
        raise DataError(
            "the stored rotary table is not that of the configuration", where=source.name,
            value="freqs_cis", allowed=f"rope_base {cfg.rope_theta}",
            fix="check rope_base in config.json",
        )  # fmt: skip
    return {"freqs_cis": "rotary table, which follows from the configuration"}


HUGINN = Family("huginn", lambda config: config.get("model_type") == "huginn_raven", plan)
