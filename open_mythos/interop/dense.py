"""Dense decoders of transformers as :class:`~open_mythos.model.dense.DenseTransformer`.

| family (``model_type``) | fields beside the common ones |
|---|---|
| llama (Llama 1 and 2, TinyLlama, SmolLM2), mistral | - |
| qwen2 | ``qkv_bias`` |
| qwen3 | ``qk_norm="head"`` |
| olmo2 | ``block_norms="out"``, ``qk_norm="width"`` |

All have grouped-query attention with half-split rotary embedding and gated feed-forwards; a model
with anything else is refused by the name of the setting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from open_mythos.checks import pick
from open_mythos.config import MythosConfig
from open_mythos.errors import DataError
from open_mythos.hub.pretrained import model_tensors
from open_mythos.interop.names import Rule, per_block, renamed, same, stacked
from open_mythos.model.dense import DenseTransformer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_NORMS = {
    "in": {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    "out": {
        "post_attention_layernorm": "attn_out_norm", "post_feedforward_layernorm": "ffn_out_norm",
    },
}  # fmt: skip
"""``block_norms`` -> names of a layer's norms, original -> ours."""
_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}
"""``hidden_act`` of a gated feed-forward -> ``ffn_kind``."""


@dataclass(frozen=True)
class Family:
    """How the models of one ``model_type`` differ from Llama."""

    fields: Callable[[Any], dict[str, Any]] = field(default=lambda hf: {})
    """Configuration of transformers -> fields of :class:`MythosConfig`."""
    must: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Setting -> allowed values; others have no counterpart here."""


_BIASES = {"attention_bias": (None, False), "mlp_bias": (None, False)}
_NO_WINDOW = {"use_sliding_window": (None, False)}

FAMILIES: dict[str, Family] = {
    "llama": Family(must=_BIASES),
    "mistral": Family(must={"sliding_window": (None,)}),
    "qwen2": Family(lambda hf: {"qkv_bias": True}, _NO_WINDOW),
    "qwen3": Family(lambda hf: {"qk_norm": "head"}, _NO_WINDOW | _BIASES),
    "olmo2": Family(lambda hf: {"block_norms": "out", "qk_norm": "width"}, _BIASES),
}
"""``model_type`` -> family."""


def dense_config(hf: PreTrainedConfig) -> MythosConfig:
    """Return the configuration of a dense model of transformers.

    The fields of the loop describe none: no prelude norm, read-out, adapters or experts.

    Raises:
        ConfigError: The family is not known; the message lists those that are.
        DataError: The model has a setting without a counterpart here.
    """
    family = pick(
        FAMILIES, hf.model_type, "model_type", what="family of dense models",
        fix="models with experts, latent attention or learned positions are not covered",
    )  # fmt: skip
    own = family.fields(hf)
    must = {"hidden_act": tuple(_ACTIVATIONS)} | family.must
    for name, allowed in must.items():
        _require(hf, name, getattr(hf, name, None), allowed)
    rope = dict(hf.rope_parameters or {})
    _require(hf, "rope_type", rope.get("rope_type", "default"), ("default",))
    _require(hf, "partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,))
    heads = hf.num_attention_heads
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // heads
    cfg = MythosConfig(
        vocab_size=hf.vocab_size, dim=hf.hidden_size, n_heads=heads,
        n_kv_heads=getattr(hf, "num_key_value_heads", None) or heads,
        gqa_head_dim=0 if head_dim * heads == hf.hidden_size else head_dim, attn_type="gqa",
        max_seq_len=hf.max_position_embeddings, max_output_tokens=hf.max_position_embeddings,
        ffn_dim=hf.intermediate_size, ffn_kind=_ACTIVATIONS[hf.hidden_act],
        rope_theta=float(rope["rope_theta"]), norm_eps=float(f"{hf.rms_norm_eps:.6g}"),
        tie_embeddings=bool(hf.tie_word_embeddings), n_experts=0, lora_rank=0, readout=False,
        prelude_norm=False, initial_state="prelude", **own,
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
        dense = DenseTransformer(cfg, model.config.num_hidden_layers)
    rules = weight_rules(cfg, dense.n_layers)
    tensors = renamed(
        {name: tensor.detach() for name, tensor in model.state_dict().items()}, rules,
        model_tensors(dense), dropped=["lm_head.weight"] if cfg.tie_embeddings else [],
        where=model.config.model_type,
    )  # fmt: skip
    if cfg.tie_embeddings:
        tensors["head.weight"] = tensors["embedding.weight"]
    dense.load_state_dict(tensors, assign=True)
    if cfg.tie_embeddings:
        dense.head.weight = dense.embedding.weight
    return dense.eval()


def _require(hf: Any, name: str, value: Any, allowed: Iterable[Any]) -> None:
    if value not in allowed:
        raise DataError(
            f"{hf.model_type}: {name} is not covered", where=f"config.json: {name}", value=value,
            allowed=" or ".join(map(repr, allowed)), fix="choose a model without it",
        )  # fmt: skip


def weight_rules(cfg: MythosConfig, n_layers: int) -> list[Rule]:
    """Return the rules that make the weights of a dense model with this configuration."""
    outer = [
        Rule("embedding.weight", ("model.embed_tokens.weight",)),
        Rule("final_norm.weight", ("model.norm.weight",)),
    ]
    if not cfg.tie_embeddings:
        outer.append(Rule("head.weight", ("lm_head.weight",)))
    pairs = [(f"blocks.{i}", i) for i in range(n_layers)]
    return outer + per_block(_layer_rules(cfg), pairs)


def _layer_rules(cfg: MythosConfig) -> list[Rule]:
    def rule(ours: str, *theirs: str) -> Rule:
        names = tuple(f"model.layers.{{i}}.{name}" for name in theirs)
        return Rule(f"{{block}}.{ours}", names, stacked if theirs[1:] else same)

    found = [
        rule("attn.out_proj.weight", "self_attn.o_proj.weight"),
        rule("ffn.gate_up.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"),
        rule("ffn.down.weight", "mlp.down_proj.weight"),
    ]
    for kind in ("weight", "bias") if cfg.qkv_bias else ("weight",):
        q, k, v = (f"self_attn.{name}_proj.{kind}" for name in "qkv")
        found += [rule(f"attn.q_proj.{kind}", q), rule(f"attn.kv_proj.{kind}", k, v)]
    if cfg.qk_norm != "none":
        names = ("q_norm.weight", "k_norm.weight")
        found += [rule(f"attn.{name}", f"self_attn.{name}") for name in names]
    norms = _NORMS[cfg.block_norms]
    return found + [rule(f"{ours}.weight", f"{name}.weight") for name, ours in norms.items()]
