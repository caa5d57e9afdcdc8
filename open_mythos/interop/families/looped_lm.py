"""IFM LoopedLM (arXiv 2610.06833): prelude, loop, coda of Llama's layers.

    e = prelude(embedding(ids))                       normed in the variant "parcae"
    h_t+1 = layers(exp(-dt a) h_t + dt B e)           variants "diagonal", "parcae"
    h_t+1 = norm(layers(W [h_t; e] + b))              variant "linear"; the norm has no weight
    logits = head(norm(coda(h_n)))

Norms are stored minus one; queries and keys are rotated in interleaved pairs. Decoding keeps the
keys and values of the last loop alone (``kv_share="last"``). h_0 is normal with variance 1/d; the
original hashes positions into it, so that only its distribution is the same here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.interop.families.plan import (
    Family,
    Fields,
    Plan,
    attention_sizes,
    blocks,
    looped,
    untrained_gate,
)
from open_mythos.interop.names import Rule, columns, half_split, per_block, plus_one, stacked
from open_mythos.interop.read import Source

TRAINED_CONTEXT = 8192
"""Tokens of a training sequence; the configuration does not say it."""
_COVERED: dict[str, dict[str, tuple[Any, ...]]] = {
    "mixtures of experts with these routers": {"num_experts": (0,), "num_values": (0,)},
    "two coupled states": {"huginn_hierarchical_state": ("none",)},
    "the orthogonal injection": {"huginn_prelude_orthogonal": (False,)},
    "injections into the layers of an unrolled model": {"dense_prelude_input_injection": ("none",)},
    "norms of queries and keys in this form": {"qknorm": (False,)},
    "gated attention": {"apply_attn_gate": (False,)},
    "another attention": {"attn_act_func": ("softmax",), "v_head_dim": ()},
    "other norms or residuals": {
        "apply_rmsnorm": (True,), "layernorm_num_groups": (1,), "norm_affine": (True,),
        "residual_func": ("base", "add"),
    },
    "another feed-forward": {"swiglu": (True,)},
    "this injection": {"huginn_input_injection": ("none", "diagonal", "linear")},
    "this initial state": {"huginn_state_init": ("zero", "input", "normal")},
    "this norm": {
        "huginn_prelude_norm": ("none", "rms"),
        "huginn_recurrent_exit_norm": ("none", "parameterless_rms"),
    },
}  # fmt: skip
"""What the library lacks -> the fields that ask for it, and their covered values."""


def plan(source: Source) -> Plan:
    """Return the plan of a LoopedLM checkpoint."""
    fields = Fields("LoopedLM", source.config.get("model"))
    for what, allowed in _COVERED.items():
        fields.only(allowed, what)
    dim, heads = fields.count("model_dim"), fields.count("num_heads")
    head_dim = fields.count("head_dim", default=dim // heads)
    fields.only({"rope_head_dim": (head_dim,), "output_size": (-1, fields.count("vocab_size"))})
    loop, module = _loop(fields)
    cfg = looped(
        fields, **attention_sizes(
            dim, heads, fields.count("num_kv_heads", default=heads), head_dim
        ),
        vocab_size=fields.count("vocab_size"), ffn_dim=fields.count("ffn_hidden_dim"),
        norm_eps=fields.number("rmsnorm_eps", default=1e-6),
        rope_theta=fields.number("rope_base", default=1e5), max_seq_len=TRAINED_CONTEXT,
        max_loop_iters=fields.count("loop_times", default=1), kv_share="last",
        embedding_scale=dim**0.5 if fields.flag("scale_emb") else 1.0, **loop,
    )  # fmt: skip
    pairs = [(block, i) for i, block in enumerate(blocks(cfg))]
    rules = [
        Rule("embedding.weight", ("embed.weight",)),
        Rule("final_norm.weight", ("output.final_norm.weight",), plus_one),
        Rule("head.weight", ("output.output.weight",)),
        *_injection(cfg, module), *per_block(_layer(head_dim), pairs), *untrained_gate(dim),
    ]  # fmt: skip
    if cfg.prelude_norm:
        name = "huginn_prelude_norm_module.weight"
        rules.append(Rule("prelude_norm.weight", (name,), plus_one))
    notes = (f"max_seq_len is {TRAINED_CONTEXT}, the length of a training sequence",)
    return Plan(cfg, rules, notes=notes)


def _loop(fields: Fields) -> tuple[dict[str, Any], str]:
    """Return the fields of the loop, and the name of the module that injects."""
    if fields.values.get("arch") == "transformer":
        return _plain_loop(fields), "loop_input_injection_module"
    layers, prelude = fields.layers("num_layers"), fields.layers("huginn_prelude_layers", default=1)
    coda = fields.layers("huginn_coda_layers", default=1)
    recurrent = fields.layers("huginn_recurrent_layers", default=layers - prelude - coda)
    start = fields.values.get("huginn_state_init", "zero")
    exit_norm = fields.values.get("huginn_recurrent_exit_norm", "none") != "none"
    kind = fields.values.get("huginn_input_injection", "diagonal")
    own = {
        "prelude_layers": prelude, "recurrent_layers": recurrent, "coda_layers": coda,
        "initial_state": {"input": "prelude"}.get(start, start),
        "prelude_norm": fields.values.get("huginn_prelude_norm", "none") != "none",
        **({"initial_state_std": fields.count("model_dim") ** -0.5} if start == "normal" else {}),
        **({"state_norm": "loop", "state_norm_weight": "plain"} if exit_norm else {}),
        **_kind(fields, kind),
    }  # fmt: skip
    return own, "input_injection"


def _plain_loop(fields: Fields) -> dict[str, Any]:
    """Return the fields of a decoder whose middle layers are repeated."""
    layers, first = (
        fields.layers("num_layers"),
        fields.layers("loop_start_layer", default=0, least=0),
    )
    end = fields.layers("loop_end_layers", default=layers)
    kind = fields.values.get("loop_input_injection", "none")
    allowed = ("none", "diagonal") if not first else ("none",)
    fields.only({"loop_input_injection": allowed}, "injections of what precedes the prelude")
    return {
        "prelude_layers": first, "recurrent_layers": end - first, "coda_layers": layers - end,
        "initial_state": "prelude", **_kind(fields, kind),
    }  # fmt: skip


def _kind(fields: Fields, kind: str) -> dict[str, Any]:
    if kind == "diagonal":
        return {"injection": "lti", "injection_rule": "euler"}
    if kind == "linear":
        return {"injection": "concat", "injection_bias": fields.flag("apply_bias_term")}
    return {"injection": "none"}


def _injection(cfg: MythosConfig, module: str) -> list[Rule]:
    ours = "recurrent.injection"
    if cfg.injection == "lti":
        return euler_injection(
            f"{module}.A_log", f"{module}.dt_bias", f"{module}.input_adapter.weight"
        )
    if cfg.injection == "none":
        return []
    both = (f"{module}.adapter.weight",)
    rules = [
        Rule(f"{ours}.A", both, columns(0, cfg.dim)),
        Rule(f"{ours}.B", both, columns(cfg.dim, 2 * cfg.dim)),
    ]
    bias = [Rule(f"{ours}.bias", (f"{module}.adapter.bias",))] if cfg.injection_bias else []
    return rules + bias


def euler_injection(log_a: str, dt_bias: str, matrix: str) -> list[Rule]:
    """Return the rules of exp(-dt a) h + dt B e, with a = exp(log_A) and dt = softplus(dt_bias)."""
    names = {"log_A": log_a, "dt_bias": dt_bias, "B": matrix}
    return [Rule(f"recurrent.injection.{ours}", (theirs,)) for ours, theirs in names.items()]


def _layer(head_dim: int) -> list[Rule]:
    turn = half_split(head_dim)

    def rule(ours: str, *theirs: str, make: Any = stacked) -> Rule:
        names = tuple(f"layers.{{i}}.{name}.weight" for name in theirs)
        return Rule(f"{{block}}.{ours}.weight", names, make)

    def keys_and_values(k: Tensor, v: Tensor) -> Tensor:
        return torch.cat((turn(k), v))

    return [
        rule("attn.q_proj", "attention.wq", make=turn),
        rule("attn.kv_proj", "attention.wk", "attention.wv", make=keys_and_values),
        rule("attn.out_proj", "attention.wo"),
        rule("ffn.gate_up", "nffn.fc1", "nffn.fc3"),
        rule("ffn.down", "nffn.fc2"),
        rule("attn_norm", "attention.norm", make=plus_one),
        rule("ffn_norm", "nffn.norm", make=plus_one),
    ]


def _recognise(config: Mapping[str, Any]) -> bool:
    model = config.get("model")
    if not isinstance(model, dict) or "loop_times" not in model:
        return False
    return model.get("arch") in ("huginn", "transformer")


LOOPED_LM = Family("looped-lm", _recognise, plan)
