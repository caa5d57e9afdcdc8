"""Ouro (arXiv 2510.25741): a whole decoder, looped, with the final norm after every loop.

    h_0 = embedding(ids);  h_t+1 = norm(layers(h_t));  logits = head(h_n)

Layers are sandwiched: a norm before each branch and one after it, before the residual. A gate on
every normed state gives the probability to stop there, in hazard form.
"""

from __future__ import annotations

from open_mythos.interop.families.plan import (
    Family,
    Fields,
    Plan,
    attention_sizes,
    blocks,
    llama_dropped,
    llama_ends,
    llama_layer,
    looped,
    rotary,
)
from open_mythos.interop.names import Rule, per_block
from open_mythos.interop.read import Source

_NORMS = {
    "input_layernorm": "attn_norm", "input_layernorm_2": "attn_out_norm",
    "post_attention_layernorm": "ffn_norm", "post_attention_layernorm_2": "ffn_out_norm",
}  # fmt: skip


def plan(source: Source) -> Plan:
    """Return the plan of an Ouro checkpoint."""
    fields = Fields("Ouro", source.config)
    fields.only({"hidden_act": ("silu",), "attention_bias": (False,), "attention_dropout": (0,)})
    fields.only({"use_sliding_window": (False,)}, "sliding windows were never trained")
    fields.only({"layer_types": (["full_attention"] * fields.layers("num_hidden_layers"),)})
    dim, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    threshold = fields.number("early_exit_threshold", default=1.0)
    cfg = looped(
        fields, **attention_sizes(
            dim, heads, fields.count("num_key_value_heads", default=heads),
            fields.count("head_dim", default=dim // heads),
        ),
        **rotary(fields, ("linear", "llama3")), vocab_size=fields.count("vocab_size"),
        ffn_dim=fields.count("intermediate_size"), norm_eps=fields.number("rms_norm_eps"),
        max_seq_len=fields.count("max_position_embeddings"),
        max_loop_iters=fields.count("total_ut_steps"),
        recurrent_layers=fields.layers("num_hidden_layers"), prelude_layers=0, coda_layers=0,
        injection="none", initial_state="prelude", state_norm="loop", block_norms="in+out",
        tie_embeddings=fields.flag("tie_word_embeddings"),
        act_threshold=threshold if 0 < threshold <= 1 else 1.0,
    )  # fmt: skip
    dropped = llama_dropped(source, cfg.tie_embeddings)
    gate = [
        Rule(f"recurrent.halting.gate.{kind}", (f"model.early_exit_gate.{kind}",))
        for kind in ("weight", "bias")
    ]
    pairs = [(block, i) for i, block in enumerate(blocks(cfg))]
    notes = (
        "the gate stops computing where the original runs all loops and then picks a state: "
        "compare fixed depths, or the gate's probabilities",
    )
    return Plan(
        cfg,
        [*llama_ends(cfg.tie_embeddings), *per_block(llama_layer(_NORMS), pairs), *gate],
        dropped,
        notes,
        gate=True,
    )


OURO = Family("ouro", lambda config: config.get("model_type") == "ouro", plan)
