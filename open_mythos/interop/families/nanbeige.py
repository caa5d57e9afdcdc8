"""Nanbeige4.2: a whole decoder of Llama's layers, looped, with the final norm between the loops.

    h_0 = embedding(ids);  h_t+1 = norm(layers(h_t));  logits = head(h_n)

With ``skip_loop_final_norm`` the norm comes after the last loop alone.
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
    untrained_gate,
)
from open_mythos.interop.names import per_block
from open_mythos.interop.read import Source

_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_NOT_COVERED = {
    "n-gram embeddings": (
        "emb_neighbor_num", "emb_split_num", "ngram_vocab_size_ratio",
        "ngram_embedding_hidden_size",
        "insert_ngram_layer_idx", "ngram_insert_all_layers",
    ),
    "hyper-connections": (
        "enable_hyper_connection", "enable_mhc", "enable_h_res_identity",
        "mhc_identity_nohresparam", "mhc_diff_for_loop", "mhc_double_stream_position_for_loop",
    ),
    "loops of some of the layers": ("enable_double_loop_split", "loop_middle_layers"),
    "attention over depth": ("enable_depth_attention",),
    "keys and values shared between loops": ("loop_share_kv",),
    "norms of queries and keys": ("qk_layernorm",),
    "a choice between the loops' predictions": ("loop_loss_weights",),
}  # fmt: skip
"""What the library lacks -> the fields that ask for it."""


def plan(source: Source) -> Plan:
    """Return the plan of a Nanbeige checkpoint."""
    fields = Fields("Nanbeige", source.config)
    for what, names in _NOT_COVERED.items():
        fields.only(dict.fromkeys(names, (False, [])), what)
    fields.only({"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)})
    fields.only({"sliding_window": (), "pretraining_tp": (1,)})
    dim, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    cfg = looped(
        fields, **attention_sizes(
            dim, heads, fields.count("num_key_value_heads", default=heads),
            fields.count("head_dim", "kv_channels", default=dim // heads),
        ),
        **rotary(fields, ("linear",)), vocab_size=fields.count("vocab_size"),
        ffn_dim=fields.count("intermediate_size"), norm_eps=fields.number("rms_norm_eps"),
        max_seq_len=fields.count("max_position_embeddings"),
        max_loop_iters=fields.count("num_loops", default=1),
        recurrent_layers=fields.layers("num_hidden_layers"), prelude_layers=0, coda_layers=0,
        injection="none", initial_state="prelude",
        state_norm="none" if fields.flag("skip_loop_final_norm") else "loop",
        tie_embeddings=fields.flag("tie_word_embeddings"),
    )  # fmt: skip
    dropped = llama_dropped(source, cfg.tie_embeddings)
    pairs = [(block, i) for i, block in enumerate(blocks(cfg))]
    rules = [
        *llama_ends(cfg.tie_embeddings),
        *per_block(llama_layer(_NORMS), pairs),
        *untrained_gate(dim),
    ]
    return Plan(cfg, rules, dropped)


NANBEIGE = Family("nanbeige", lambda config: config.get("model_type") == "nanbeige", plan)
