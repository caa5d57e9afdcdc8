"""Dense decoders of transformers as :class:`~open_mythos.model.dense.DenseTransformer`.

| family (``model_type``) | fields beside the common ones |
|---|---|
| llama (Llama 1 to 3, TinyLlama, SmolLM2) | ``rope_scaling`` |
| mistral | ``window`` |
| qwen2 (also Qwen2.5) | ``qkv_bias`` |
| qwen3 | ``qk_norm="head"`` |
| olmo2 | ``block_norms="out"``, ``qk_norm="width"`` |
| smollm3 | layers without rotary embedding |
| gemma3_text | ``block_norms="in+out"``, ``qk_norm="head"``, scales, GELU, windows by layer |

All have grouped-query attention with half-split rotary embedding and gated feed-forwards; a model
with anything else is refused by the name of the setting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from json import dumps, loads
from typing import TYPE_CHECKING, Any

import torch

from open_mythos.checks import pick
from open_mythos.config import SCALINGS, MythosConfig
from open_mythos.errors import DataError
from open_mythos.hub.pretrained import model_tensors
from open_mythos.interop.families.plan import llama_ends, llama_layer
from open_mythos.interop.names import Make, Rule, per_block, plus_one, renamed, same
from open_mythos.model.dense import DenseTransformer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_NORMS = {
    "in": {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    "out": {
        "post_attention_layernorm": "attn_out_norm", "post_feedforward_layernorm": "ffn_out_norm",
    },
    "in+out": {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "attn_out_norm",
        "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "ffn_out_norm",
    },
}  # fmt: skip
"""``block_norms`` -> names of a layer's norms, original -> ours."""
_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}
"""Activation of a gated feed-forward -> ``ffn_kind``."""


@dataclass(frozen=True)
class Family:
    """How the models of one ``model_type`` differ from Llama.

    Attributes:
        fields: Configuration of transformers -> fields of :class:`MythosConfig`.
        must: Setting -> allowed values; others have no counterpart here.
        norm: Makes the weight of a norm.
    """

    fields: Callable[[Any], dict[str, Any]] = field(default=lambda hf: {})
    must: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    norm: Make = same


def _gemma3(hf: Any) -> dict[str, Any]:
    return {
        "block_norms": "in+out", "qk_norm": "head", "attn_scale": hf.query_pre_attn_scalar**-0.5,
        "embedding_scale": hf.hidden_size**0.5, "logit_softcap": hf.final_logit_softcapping or 0.0,
    }  # fmt: skip


_NO_BIAS = {"attention_bias": (None, False), "mlp_bias": (None, False)}
FAMILIES: dict[str, Family] = {
    "llama": Family(must=_NO_BIAS),
    "mistral": Family(),
    "qwen2": Family(lambda hf: {"qkv_bias": True}),
    "qwen3": Family(lambda hf: {"qk_norm": "head"}, _NO_BIAS),
    "olmo2": Family(lambda hf: {"block_norms": "out", "qk_norm": "width"}, _NO_BIAS),
    "smollm3": Family(must=_NO_BIAS),
    "gemma3_text": Family(
        _gemma3,
        _NO_BIAS
        | {"attn_logit_softcapping": (None,), "use_bidirectional_attention": (None, False)},
        plus_one,
    ),
}
"""``model_type`` -> family."""


def dense_config(hf: PreTrainedConfig) -> MythosConfig:
    """Return the configuration of a dense model of transformers.

    The fields of the loop describe none: no prelude norm, read-out, adapters or experts. All layers
    but the last count as the prelude, so that ``layer_overrides`` may name each.

    Raises:
        ConfigError: The family is not known; the message lists those that are.
        DataError: The model has a setting without a counterpart here.
    """
    family = _family(hf)
    for name, allowed in family.must.items():
        _require(hf, name, getattr(hf, name, None), allowed)
    activation = getattr(hf, "hidden_activation", None) or getattr(hf, "hidden_act", None)
    _require(hf, "hidden_act", activation, tuple(_ACTIVATIONS))
    heads = hf.num_attention_heads
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // heads
    common, overrides = _most_common([_own(hf, i) for i in range(hf.num_hidden_layers)])
    cfg = MythosConfig(
        vocab_size=hf.vocab_size, dim=hf.hidden_size, n_heads=heads,
        n_kv_heads=getattr(hf, "num_key_value_heads", None) or heads,
        gqa_head_dim=0 if head_dim * heads == hf.hidden_size else head_dim, attn_type="gqa",
        max_seq_len=hf.max_position_embeddings, max_output_tokens=hf.max_position_embeddings,
        ffn_dim=hf.intermediate_size, ffn_kind=_ACTIVATIONS[str(activation)],
        norm_eps=float(f"{hf.rms_norm_eps:.6g}"),  # GGUF files store it in float32
        tie_embeddings=bool(hf.tie_word_embeddings), n_experts=0, lora_rank=0, readout=False,
        prelude_norm=False, initial_state="prelude", prelude_layers=hf.num_hidden_layers - 1,
        recurrent_layers=1, coda_layers=0, layer_overrides=overrides or None,
        **common, **family.fields(hf),
    )  # fmt: skip
    cfg.validate()
    return cfg


def from_transformers(model: PreTrainedModel) -> DenseTransformer:
    """Return a dense model of transformers as one of this library, in float32, for evaluation.

    Its logits are those of ``model`` up to rounding: stacked projections sum in another order.

    Raises:
        ConfigError: The family is not known.
        DataError: A setting has no counterpart here, or the weights are not exactly those of the
            family.
    """
    cfg = dense_config(model.config)
    with torch.device("meta"):
        dense = DenseTransformer(cfg)
    tensors = renamed(
        {name: tensor.detach() for name, tensor in model.state_dict().items()},
        weight_rules(cfg, dense.n_layers, _family(model.config).norm), model_tensors(dense),
        dropped=["lm_head.weight"] if cfg.tie_embeddings else [], where=model.config.model_type,
    )  # fmt: skip
    if cfg.tie_embeddings:
        tensors["head.weight"] = tensors["embedding.weight"]
    dense.load_state_dict(tensors, assign=True)
    if cfg.tie_embeddings:
        dense.head.weight = dense.embedding.weight
    return dense.eval()


def _family(hf: Any) -> Family:
    family: Family = pick(
        FAMILIES, hf.model_type, "model_type", what="family of dense models",
        fix="models with experts, latent attention or learned positions are not covered",
    )  # fmt: skip
    return family


def _require(hf: Any, name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise DataError(
            f"{hf.model_type}: {name} is not covered", where=f"config.json: {name}", value=value,
            allowed=" or ".join(map(repr, allowed)), fix="choose a model without it",
        )  # fmt: skip


def _own(hf: Any, layer: int) -> dict[str, Any]:
    """Return rotary embedding and window of one layer, as fields of the configuration."""
    kinds = getattr(hf, "layer_types", None)
    kind = kinds[layer] if kinds else "full_attention"
    _require(hf, "layer_types", kind, ("full_attention", "sliding_attention"))
    window = getattr(hf, "sliding_window", None) or 0
    rotates = getattr(hf, "no_rope_layers", None)
    return {
        "window": window if not kinds or kind == "sliding_attention" else 0,
        **_rotary(hf, (hf.rope_parameters or {}).get(kind, hf.rope_parameters) or {}),
        **({"rope_theta": 0.0, "rope_scaling": None} if rotates and not rotates[layer] else {}),
    }


def _rotary(hf: Any, rope: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a rotary embedding."""
    kind = rope.get("rope_type", "default")
    _require(hf, "rope_type", kind, ("default", *SCALINGS))
    _require(hf, "partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,))
    scaling = None
    if kind in SCALINGS:
        scaling = {"rope_type": kind} | {name: rope.get(name) for name in SCALINGS[kind]}
    return {"rope_theta": float(rope["rope_theta"]), "rope_scaling": scaling}


def _most_common(
    layers: list[dict[str, Any]],
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the fields that most layers have, and layer -> fields that differ from them."""
    (most, _), *_ = Counter(dumps(own, sort_keys=True) for own in layers).most_common(1)
    common: dict[str, Any] = loads(most)
    differing = {
        str(i): {name: value for name, value in own.items() if value != common[name]}
        for i, own in enumerate(layers)
    }
    return common, {layer: own for layer, own in differing.items() if own}


def weight_rules(cfg: MythosConfig, n_layers: int, norm: Make = same) -> list[Rule]:
    """Return the rules that make the weights of a dense model; ``norm`` makes those of norms."""
    norms = dict(_NORMS[cfg.block_norms])
    if cfg.qk_norm != "none":
        norms |= {f"self_attn.{name}": f"attn.{name}" for name in ("q_norm", "k_norm")}
    layer = llama_layer(norms, norm, cfg.qkv_bias)
    pairs = [(f"blocks.{i}", i) for i in range(n_layers)]
    return llama_ends(cfg.tie_embeddings, norm) + per_block(layer, pairs)
