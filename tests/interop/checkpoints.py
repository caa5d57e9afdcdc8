"""Configurations and random weights of small checkpoints, under the names of every family."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
VOCAB, DIM, HEADS, KV_HEADS, HIDDEN, LENGTH = 61, 32, 4, 2, 48, 64


def angles(positions: Tensor, width: int, theta: float) -> Tensor:
    """(T, 1, width / 2)"""
    frequencies = theta ** (-torch.arange(0, width, 2).double() / width)
    return (positions.double()[:, None] * frequencies)[:, None]


def _llama_shapes(
    layers: int, width: int, extra: tuple[str, ...] = ()
) -> dict[str, tuple[int, ...]]:
    shapes = {"model.embed_tokens": (VOCAB, DIM), "model.norm": (DIM,), "lm_head": (VOCAB, DIM)}
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {
            f"{at}.self_attn.q_proj": (HEADS * width, DIM),
            f"{at}.self_attn.k_proj": (KV_HEADS * width, DIM),
            f"{at}.self_attn.v_proj": (KV_HEADS * width, DIM),
            f"{at}.self_attn.o_proj": (DIM, HEADS * width),
            f"{at}.mlp.gate_proj": (HIDDEN, DIM), f"{at}.mlp.up_proj": (HIDDEN, DIM),
            f"{at}.mlp.down_proj": (DIM, HIDDEN),
        }  # fmt: skip
        norms = ("input_layernorm", "post_attention_layernorm", *extra)
        shapes |= {f"{at}.{name}": (DIM,) for name in norms}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def _llama_config(**own: object) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB, "hidden_size": DIM, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "intermediate_size": HIDDEN, "rms_norm_eps": 1e-6,
        "max_position_embeddings": LENGTH, "hidden_act": "silu", "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "float32", **own,
    }  # fmt: skip


def ouro() -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    config = _llama_config(
        model_type="ouro", num_hidden_layers=3, head_dim=8, rope_theta=1e6, total_ut_steps=4,
        early_exit_threshold=0.9, layer_types=["full_attention"] * 3, use_sliding_window=False,
    )  # fmt: skip
    shapes = _llama_shapes(3, 8, ("input_layernorm_2", "post_attention_layernorm_2"))
    gate = {"model.early_exit_gate.weight": (1, DIM), "model.early_exit_gate.bias": (1,)}
    return config, shapes | gate


def nanbeige(skip: bool = False) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    config = _llama_config(
        model_type="nanbeige", num_hidden_layers=3, head_dim=12, num_loops=2,
        skip_loop_final_norm=skip, enable_hyper_connection=False, loop_loss_weights=[],
        emb_neighbor_num=None, rope_theta=7e7,
    )  # fmt: skip
    return config, _llama_shapes(3, 12)


def huginn() -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    config = {
        "model_type": "huginn_raven", "n_embd": DIM, "n_heads": HEADS, "num_key_value_heads": HEADS,
        "n_layers_in_prelude": 2, "n_layers_in_recurrent_block": 3, "n_layers_in_coda": 2,
        "intermediate_size": HIDDEN, "mean_recurrence": 8, "block_size": LENGTH,
        "vocab_size": VOCAB, "padded_vocab_size": VOCAB, "norm_eps": 1e-6, "rope_base": 50000.0,
        "qk_bias": True, "bias": False, "tie_embeddings": True, "injection_type": "linear",
        "state_init": "like-init",
        "init_values": {"std": math.sqrt(2 / (5 * DIM)), "embed_scale": math.sqrt(DIM)},
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (VOCAB, DIM), "transformer.ln_f.weight": (DIM,),
        "transformer.adapter.weight": (DIM, 2 * DIM), "lm_head.weight": (VOCAB, DIM),
        "freqs_cis": (1, LENGTH, 1, DIM // HEADS // 2, 2),
    }  # fmt: skip
    for part, count in (("prelude", 2), ("core_block", 3), ("coda", 2)):
        for i in range(count):
            at = f"transformer.{part}.{i}"
            shapes |= {f"{at}.norm_{n}.weight": (DIM,) for n in (1, 2, 3, 4)}
            shapes |= {
                f"{at}.attn.Wqkv.weight": (3 * DIM, DIM), f"{at}.attn.proj.weight": (DIM, DIM),
                f"{at}.attn.qk_bias": (2, 1, HEADS, DIM // HEADS),
                f"{at}.mlp.fc.weight": (2 * HIDDEN, DIM), f"{at}.mlp.proj.weight": (DIM, HIDDEN),
            }  # fmt: skip
    return config, shapes


def parcae(core: int = 2) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    config = {
        "_class_name": "ParcaeConfig", "n_embd": 2 * DIM, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "intermediate_size": HIDDEN, "n_layers_in_prelude": 2,
        "n_layers_in_recurrent_block": core, "n_layers_in_coda": 2, "mean_recurrence": 8,
        "mean_backprop_depth": 4, "block_size": LENGTH, "vocab_size": VOCAB, "norm_eps": 1e-5,
        "injection_type": "diagonal", "block_class_name": "TransformerPreNormBlock",
        "state_init": "like-init", "qk_norm": True,
        "rope_settings": {"use_rope": True, "rope_condense_ratio": 1, "rope_base": 50000.0},
    }  # fmt: skip
    dim = 2 * DIM
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (VOCAB, dim), "lm_head.weight": (VOCAB, dim),
        "transformer.ln_f.weight": (dim,), "transformer.ln_prelude.weight": (dim,),
        "transformer.C.weight": (dim, dim), "transformer.adapter.A_log": (dim,),
        "transformer.adapter.dt_bias": (dim,), "transformer.adapter.B": (dim, dim),
        "freqs_cis": (1, LENGTH, 1, dim // HEADS // 2, 2),
    }  # fmt: skip
    parts = {"prelude": 2, "core_block": core, "coda": 2}
    names = [f"transformer.{part}.{i}" for part, n in parts.items() for i in range(n)]
    for number, at in enumerate(names):
        shapes |= {f"{at}.norm_{n}.weight": (dim,) for n in (1, 2)}
        shapes |= {f"{at}.attn.c_{n}.weight": (dim, dim) for n in ("q", "k", "v", "proj")}
        shapes |= {f"{at}.mlp.fc.weight": (HIDDEN, dim), f"{at}.mlp.proj.weight": (dim, HIDDEN)}
        executed = number if number < 2 + core else number + 7 * core  # the loop runs 8 times
        if executed % 2 == (4 * core - 1) % 2:
            shapes[f"{at}.attn.ve_gate.weight"] = (HEADS, 32)
        if number % 2 == (3 + core) % 2:
            shapes[f"value_embeds.{number}.weight"] = (VOCAB, dim)
    return config, shapes


def looped_lm(variant: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    model = {
        "arch": "huginn", "num_layers": 4, "model_dim": DIM, "num_heads": HEADS,
        "num_kv_heads": KV_HEADS, "head_dim": 8, "ffn_hidden_dim": HIDDEN, "vocab_size": VOCAB,
        "output_size": -1, "swiglu": True, "apply_bias_term": True, "apply_rmsnorm": True,
        "rmsnorm_eps": 1e-6, "rope_base": 1e6, "rope_head_dim": 8, "loop_times": 5,
        "huginn_prelude_layers": 1, "huginn_recurrent_layers": 2, "huginn_coda_layers": 1,
        "huginn_state_init": "normal", "huginn_input_injection": "diagonal",
        "huginn_prelude_norm": "none", "huginn_recurrent_exit_norm": "none", "qknorm": False,
        "num_experts": 0, "huginn_hierarchical_state": "none",
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (VOCAB, DIM), "output.final_norm.weight": (DIM,),
        "output.output.weight": (VOCAB, DIM),
    }  # fmt: skip
    for i in range(4):
        at = f"layers.{i}"
        shapes |= {
            f"{at}.attention.wq.weight": (HEADS * 8, DIM), f"{at}.attention.norm.weight": (DIM,),
            f"{at}.attention.wk.weight": (KV_HEADS * 8, DIM),
            f"{at}.attention.wv.weight": (KV_HEADS * 8, DIM),
            f"{at}.attention.wo.weight": (DIM, HEADS * 8), f"{at}.nffn.norm.weight": (DIM,),
            f"{at}.nffn.fc1.weight": (HIDDEN, DIM), f"{at}.nffn.fc3.weight": (HIDDEN, DIM),
            f"{at}.nffn.fc2.weight": (DIM, HIDDEN),
        }  # fmt: skip
    at = "input_injection"
    if variant == "linear":
        model |= {"huginn_input_injection": "linear",
                  "huginn_recurrent_exit_norm": "parameterless_rms"}  # fmt: skip
        shapes |= {f"{at}.adapter.weight": (DIM, 2 * DIM), f"{at}.adapter.bias": (DIM,)}
    elif variant == "repeated":
        model |= {"arch": "transformer", "loop_start_layer": 1, "loop_end_layers": 3,
                  "loop_input_injection": "none"}  # fmt: skip
    else:
        shapes |= {f"{at}.A_log": (DIM,), f"{at}.dt_bias": (DIM,)}
        shapes[f"{at}.input_adapter.weight"] = (DIM, DIM)
    if variant == "parcae":
        model["huginn_prelude_norm"] = "rms"
        shapes["huginn_prelude_norm_module.weight"] = (DIM,)
    return {"model": model}, shapes


def random_weights(shapes: Mapping[str, tuple[int, ...]], minus_one: bool = False) -> Weights:
    """Weights of every tensor, such that each matters and no loop is chaotic."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name == "freqs_cis":
            turn = angles(torch.arange(shape[1]), 2 * shape[3], 50000.0)
            weights[name] = torch.stack((turn.cos(), turn.sin()), -1).float().view(shape)
        elif "norm" in name or ".ln_" in name:
            weights[name] = 0.2 * noise + (0 if minus_one else 1)
        elif name.endswith(("A_log", "dt_bias", "qk_bias", "bias")):
            weights[name] = 0.3 * noise
        elif "embed" in name or "wte" in name:
            weights[name] = noise
        else:
            weights[name] = 0.5 * noise / shape[-1] ** 0.5
    if "transformer.wte.weight" in weights:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return weights
