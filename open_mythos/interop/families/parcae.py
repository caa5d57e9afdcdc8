"""Parcae (arXiv 2604.12946): prelude, a loop with a stable injection, coda.

    e = norm(prelude(embedding(ids)));  h_t+1 = core(exp(-dt a) h_t + dt B e)
    logits = head(norm(coda(C h_n)))

Queries and keys are rotated in interleaved pairs and then normalized, without weights. Every
second layer adds gated embeddings of the tokens to its values. Feed-forwards are relu^2 / 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from open_mythos.interop.families.looped_lm import euler_injection
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
from open_mythos.interop.names import Rule, fixed, half_split, per_block, times
from open_mythos.interop.read import Source

QK_NORM_EPS = torch.finfo(torch.float32).eps
"""What ``F.rms_norm`` adds if it is not told otherwise."""
_COVERED = {
    "block_class_name": ("TransformerPreNormBlock",), "norm_class_name": ("RMSNorm",),
    "mlp_class_name": ("BaseMLP",), "nonlin_name": ("ReLU2",), "injection_type": ("diagonal",),
    "state_init": ("like-init",), "mup_model_scaling_factor": (1,), "prelude_norm": (True,),
    "qk_norm": (True,), "bias": (False,), "qk_bias": (False,), "tie_embeddings": (True,),
    "clip_qkv": (), "logit_softcap": (),
}  # fmt: skip


def plan(source: Source) -> Plan:
    """Return the plan of a Parcae checkpoint."""
    fields = Fields("Parcae", source.config)
    fields.only(_COVERED)
    dim, heads = fields.count("n_embd"), fields.count("num_attention_heads")
    fields.only({
        "num_key_value_heads": (heads,), "recurrent_num_attention_heads": (heads,),
        "recurrent_embedding_dimension": (dim,),
        "recurrent_intermediate_embedding_dimension": (fields.count("intermediate_size"),),
    })  # fmt: skip
    rope = Fields("Parcae", {**source.config, **fields.part("rope_settings").values})
    rope.only({"use_rope": (True,), "rope_condense_ratio": (1,)})
    parts = {
        "prelude": fields.layers("n_layers_in_prelude", least=0),
        "core_block": fields.layers("n_layers_in_recurrent_block"),
        "coda": fields.layers("n_layers_in_coda", least=0),
    }
    layers = [f"transformer.{part}.{i}" for part, count in parts.items() for i in range(count)]
    tables, gates = _value_layers(fields, parts)
    gated = sorted(tables & gates)
    cfg = looped(
        fields, **attention_sizes(dim, heads, heads, dim // heads),
        vocab_size=fields.count("padded_vocab_size", "vocab_size"),
        ffn_dim=fields.count("intermediate_size"), ffn_kind="relu2",
        norm_eps=fields.number("norm_eps", default=1e-5),
        rope_theta=rope.number("rope_base", default=50000.0),
        max_seq_len=fields.count("block_size"), max_loop_iters=fields.count("mean_recurrence"),
        prelude_layers=parts["prelude"], recurrent_layers=parts["core_block"],
        coda_layers=parts["coda"], prelude_norm=True, readout=True, injection_rule="euler",
        initial_state="normal", initial_state_std=(2 / (5 * dim)) ** 0.5, tie_embeddings=True,
        qk_norm="head_after_rope", qk_norm_eps=QK_NORM_EPS,
        layer_overrides={str(i): {"value_embedding": True} for i in gated} or None,
    )  # fmt: skip
    adapter = "transformer.adapter"
    rules = [
        Rule("embedding.weight", ("transformer.wte.weight",)),
        Rule("prelude_norm.weight", ("transformer.ln_prelude.weight",)),
        Rule("readout.weight", ("transformer.C.weight",)),
        Rule("final_norm.weight", ("transformer.ln_f.weight",)),
        *euler_injection(f"{adapter}.A_log", f"{adapter}.dt_bias", f"{adapter}.B"),
        *per_block(_block(cfg.head_dim), zip(blocks(cfg), layers, strict=True)),
        *untrained_gate(dim),
    ]
    for j, i in enumerate(gated):
        table, gate = f"value_embeds.{i}.weight", f"{layers[i]}.attn.ve_gate.weight"
        rules += [
            Rule(f"value_embeddings.{j}.weight", (table,)),
            Rule(f"{blocks(cfg)[i]}.attn.value_gate.weight", (gate,)),
        ]
    unused = [f"value_embeds.{i}.weight" for i in tables - gates]
    unused += [f"{layers[i]}.attn.ve_gate.weight" for i in gates - tables]
    why = "value embeddings need both a table and a gate"
    dropped = tied_head(source, "transformer.wte.weight") | dict.fromkeys(unused, why)
    if "freqs_cis" in source.tensors:
        dropped["freqs_cis"] = "rotary table, which follows from the configuration"
    return Plan(cfg, rules, dropped)


def _value_layers(fields: Fields, parts: Mapping[str, int]) -> tuple[set[int], set[int]]:
    """Return the stored layers with a table of value embeddings, and those with a gate.

    Both are every second one, but counted apart: tables by stored layer, gates by executed layer.
    """
    prelude, core, coda = parts.values()
    stored = prelude + core + coda
    coda_runs_at = prelude + core * fields.count("mean_recurrence")
    executed = [*range(prelude + core), *range(coda_runs_at, coda_runs_at + coda)]
    last_table = stored - 1
    last_gate = core * fields.count("mean_backprop_depth") - 1
    tables = {i for i in range(stored) if (i - last_table) % 2 == 0}
    return tables, {i for i, at in enumerate(executed) if (at - last_gate) % 2 == 0}


def _block(head_dim: int) -> list[Rule]:
    turn = half_split(head_dim)

    def keys_and_values(k: Tensor, v: Tensor) -> Tensor:
        return torch.cat((turn(k), v))

    def rule(ours: str, *theirs: str, make: Any = None) -> Rule:
        names = tuple(f"{{i}}.{name}.weight" for name in theirs)
        return Rule(f"{{block}}.{ours}.weight", names, *([make] if make else []))

    return [
        rule("attn.q_proj", "attn.c_q", make=turn),
        rule("attn.kv_proj", "attn.c_k", "attn.c_v", make=keys_and_values),
        rule("attn.out_proj", "attn.c_proj"),
        rule("attn.q_norm", make=fixed(torch.ones(head_dim))),
        rule("attn.k_norm", make=fixed(torch.ones(head_dim))),
        rule("ffn.up", "mlp.fc"),
        rule("ffn.down", "mlp.proj", make=times(0.5)),
        rule("attn_norm", "norm_1"),
        rule("ffn_norm", "norm_2"),
    ]


def _recognise(config: Mapping[str, Any]) -> bool:
    return config.get("_class_name") == "ParcaeConfig" or config.get("model_type") == "parcae"


PARCAE = Family("parcae", _recognise, plan)
