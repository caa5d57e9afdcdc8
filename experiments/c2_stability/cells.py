"""The claim in words, the arms, and what is run."""

from __future__ import annotations

from typing import Any

from experiments.claim import QUICK, Cell, Claim
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

CLAIM = Claim(
    id="c2",
    title="Stability by construction",
    statement="A linear injection with rho(A) < 1 by construction trains at learning rates at "
    "which unconstrained injection diverges.",
    source="Parcae, arXiv 2604.12946",
    literature="With growing learning rate the plain recurrent model diverges first, the one "
    "with normed residuals later, the constrained one nowhere in the sweep. Published "
    "constrained runs still exploded late in training until the prelude's output was normalised.",
    expected="The same order, and no difference between Euler's rule and the exact hold, which "
    "differ in a gain that is learnt anyway.",
    method="A byte-level model of one prelude, one looped and one coda block on Python's "
    "standard library, about six loops drawn anew at each step, random h_0 in training and h_0 = "
    "0 in evaluation, AdamW, warm-up and then a constant rate, gradients clipped to norm 1. Arms "
    "differ in the injection alone: a learnt W [h; e] (concat), the same with sandwich norms, h "
    "+ e (additive), the predecessor's A h + B e + Block(norm(h + e)), and A h + B e with or "
    "without the norm on the prelude's output, or with Euler's rule. Diverged means: loss or "
    "gradient not finite; loss above 1.3 times its minimum for the given number of steps in a "
    "row; or ||h_T|| above 1000 ||h_0||. The table shows the validation loss at 16 loops in nats "
    "per byte.",
    pass_mark="An arm's largest stable rate is the highest one up to which none of the seeds "
    f"diverges. Holds if that of the constrained injection is at least {RATIO:g} times that of "
    "both unconstrained ones (concat, additive); in part if it is larger than that of one of "
    "them; does not hold if it is larger than neither; unclear if nothing diverges.",
    limits="Divergence within a few hundred steps of a small model, so the rates are higher than "
    "those at which large models fail. What only explodes after thousands of steps is not seen.",
    hardware={"cpu": "two cores", "gpu": "one GPU of 80 GB"},
    minutes={"cpu": 8},
)  # fmt: skip

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
    """Every arm at every learning rate with three seeds."""
    if scale == QUICK:
        return [_cell("concat", 3e-3, 0, scale), _cell("lti", 3e-3, 0, scale)]
    return [
        _cell(arm, lr, seed, scale)
        for seed in range(3)
        for arm in ARMS
        for lr in LEARNING_RATES[scale]
    ]


def _cell(arm: str, lr: float, seed: int, scale: str) -> Cell:
    dim, heads, seq_len = _WIDTHS[scale]
    fields = dict(ARMS[arm])
    rule = fields.pop("rule")
    model = {
        "vocab_size": VOCABULARY, "dim": dim, "n_heads": heads, "n_kv_heads": heads,
        "attn_type": "gqa", "max_seq_len": seq_len, "n_experts": 0, "lora_rank": 0,
        "prelude_layers": 1, "coda_layers": 1, "ffn_dim": 2 * dim, "readout": False,
        "tie_embeddings": True, **fields,
    }  # fmt: skip
    run = _RUNS[scale] | {"rule": rule, "lr": lr, "seq_len": seq_len, "model": model}
    return Cell(f"{arm}-lr{lr:g}", seed, run | {"arm": arm})
