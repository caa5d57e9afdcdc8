"""The numbers of the claim, and what is run."""

from __future__ import annotations

from typing import Any

from experiments.claim import QUICK, Cell, Claim
from open_mythos.variants import VARIANTS

PRODUCTION = ("1b", "3b", "7b", "10b", "50b", "100b", "500b", "1t")
"""Variants of a size at which the claim is made."""
SMALLER = 10.0
EXACT = 1e-4
COUNTED = "counted"

CLAIM = Claim.read(__file__, vars())

_HEADS = 16
_SMALL = {
    "vocab_size": 256, "dim": 256, "n_heads": _HEADS, "max_loop_iters": 4, "prelude_layers": 1,
    "coda_layers": 1, "kv_lora_rank": 32, "q_lora_rank": 64, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "n_experts": 0, "lora_rank": 0, "max_seq_len": 256,
}  # fmt: skip
# eight times as wide: the widths of mythos_1b itself
_LARGE = _SMALL | {
    "dim": 2048, "max_loop_iters": 16, "prelude_layers": 2, "coda_layers": 2, "kv_lora_rank": 256,
    "q_lora_rank": 512, "qk_rope_head_dim": 32, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "max_seq_len": 2048,
}  # fmt: skip
ATTENTIONS: dict[str, dict[str, Any]] = {
    "mla": {"attn_type": "mla"},
    "gqa4": {"attn_type": "gqa", "n_kv_heads": 4},
    "gqa8": {"attn_type": "gqa", "n_kv_heads": 8},
    "mha": {"attn_type": "gqa", "n_kv_heads": _HEADS},
}
_RUNS = {
    "cpu": {"device": "cpu", "batch": 2, "prompt": 40, "tokens": 96},
    "gpu": {"device": "cuda", "batch": 2, "prompt": 512, "tokens": 1024},
    QUICK: {"device": "cpu", "batch": 1, "prompt": 5, "tokens": 8},
}


def cells(scale: str) -> list[Cell]:
    """One that counts, and for each attention and way to share three that measure."""
    counted = Cell(COUNTED, 0, {"variants": list(VARIANTS)})
    model = _LARGE if scale == "gpu" else _SMALL
    if scale == QUICK:
        return [counted, Cell("mla", 0, {"model": model | ATTENTIONS["mla"], **_RUNS[scale]})]
    measured = [
        Cell(arm + suffix, seed, {"model": model | fields | {"kv_share": share}, **_RUNS[scale]})
        for seed in range(3)
        for arm, fields in ATTENTIONS.items()
        for share, suffix in (("none", ""), ("last", "-shared"))
    ]
    return [counted, *measured]
