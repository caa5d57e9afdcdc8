"""The numbers of the claim, the arms, and what is run."""

from __future__ import annotations

from typing import Any

from experiments.claim import QUICK, Cell, Claim, sweep
from experiments.text import VOCABULARY

ARMS: dict[str, dict[str, Any]] = {
    "concat": {"rule": "concat", "prelude_norm": False},
    "concat-sandwich": {"rule": "sandwich", "prelude_norm": False},
    "additive": {"rule": "additive", "prelude_norm": False},
    "predecessor": {"rule": "predecessor", "prelude_norm": False},
    "lti-no-prelude-norm": {"rule": "stable", "prelude_norm": False},
    "lti-euler": {"rule": "stable", "prelude_norm": True, "injection_rule": "euler"},
    "lti": {"rule": "stable", "prelude_norm": True},
}
UNCONSTRAINED = ("concat", "additive")
CONSTRAINED = "lti"
RATIO = 2.0
LEARNING_RATES = {"cpu": (3e-3, 1e-2, 2e-2, 4e-2), "gpu": (3e-4, 1e-3, 3e-3, 1e-2, 2e-2)}

CLAIM = Claim.read(__file__, vars())

_CPU: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "steps": 300, "warmup": 10, "patience": 100, "batch": 8,
    "mean_loops": 6, "max_loops": 12, "eval_loops": [1, 4, 16, 32], "val_windows": 64,
    "log_every": 10,
}  # fmt: skip
_RUNS: dict[str, dict[str, Any]] = {
    "cpu": _CPU,
    "gpu": _CPU | {"device": "cuda", "dtype": "bfloat16", "steps": 500, "warmup": 50,
                   "patience": 200, "batch": 32, "mean_loops": 8, "max_loops": 16},
    QUICK: _CPU | {"steps": 5, "warmup": 2, "batch": 4, "val_windows": 4, "eval_loops": [1, 4]},
}  # fmt: skip
_WIDTHS = {"cpu": (64, 4, 32), "gpu": (512, 8, 256), QUICK: (32, 2, 16)}


def cells(scale: str) -> list[Cell]:
    """Return every arm at every learning rate with three seeds."""
    quick = scale == QUICK
    arms, rates = (["concat", "lti"], [3e-3]) if quick else (ARMS, LEARNING_RATES[scale])
    grid = {f"{arm}-lr{lr:g}": _settings(arm, lr, scale) for arm in arms for lr in rates}
    return sweep(grid, [0] if quick else range(3))


def _settings(arm: str, lr: float, scale: str) -> dict[str, Any]:
    dim, heads, seq_len = _WIDTHS[scale]
    fields = dict(ARMS[arm])
    rule = fields.pop("rule")
    model = {
        "vocab_size": VOCABULARY, "dim": dim, "n_heads": heads, "n_kv_heads": heads,
        "attn_type": "gqa", "max_seq_len": seq_len, "n_experts": 0, "lora_rank": 0,
        "prelude_layers": 1, "coda_layers": 1, "ffn_dim": 2 * dim, "readout": False,
        "tie_embeddings": True, **fields,
    }  # fmt: skip
    return _RUNS[scale] | {"arm": arm, "rule": rule, "lr": lr, "seq_len": seq_len, "model": model}
