"""The claim in words, the arms, and what is run."""

from __future__ import annotations

from typing import Any

from experiments.claim import QUICK, Cell, Claim, Place
from experiments.text import VOCABULARY, train

LOOPS = 8
ONCE, RECURRENT = 2, 4
LOOPED = "looped"
WHOLE, HALF, UNROLLED = "dense-12", "dense-6", "dense-34"
LAYERS = {HALF: ONCE + RECURRENT, WHOLE: 2 * (ONCE + RECURRENT), UNROLLED: ONCE + RECURRENT * LOOPS}
"""Dense arm -> blocks: as many as the looped model stores, twice that, as many as it executes."""
PHI = 0.46
EQUIVALENT = ONCE + LOOPS**PHI * RECURRENT
PART = 0.5

CLAIM = Claim(
    id="c3",
    title="Half the parameters",
    statement="A recurrent-depth transformer with half the parameters matches a dense "
    "transformer trained on the same data.",
    source="Parcae, arXiv 2604.12946; iso-depth law: arXiv 2604.21106",
    literature="Parcae's 770M model ties a 1.3B transformer on the CORE score (25.07 against "
    "25.45), not on perplexity (12.49 against 11.95), and on fewer tokens. The iso-depth law, "
    f"N_once + loops^phi N_recurrent with phi = {PHI}, gives one prelude, four looped and one "
    f"coda block at eight loops the worth of {EQUIVALENT:.1f} blocks: a tie with 12, at 34 / 12 = "
    "2.8 times the compute.",
    expected="About a tie with the dense model of twice the parameters, well behind a dense "
    "model of the same compute.",
    method="Byte-level models of equal width on Python's standard library, the same batches in "
    f"the same order: 1/4/1 blocks with the four looped {LOOPS} times, against dense models of "
    f"{LAYERS[WHOLE]} blocks (twice the matrix parameters), of {LAYERS[HALF]} (the same "
    f"parameters, no loops) and of {LAYERS[UNROLLED]} (the same FLOPs per token). All have the "
    "same sweep of learning rates; each arm counts at its best, chosen by the mean validation "
    "loss over seeds.",
    pass_mark="Differences are taken seed by seed. Holds if the looped model's loss is above "
    f"that of {WHOLE} by no more than one standard deviation of that difference; in part if it "
    f"makes up at least {PART:.0%} of the gap between {HALF} and {WHOLE}; otherwise it does not "
    "hold; unclear if that gap is no larger than its own standard deviation, so that halving the "
    "parameters costs nothing anyway.",
    limits="Models of a hundred thousand parameters on two hundred thousand bytes; what large "
    "models do is not settled by it. The second task of the literature, modular arithmetic "
    "trees, is not run.",
    hardware={"cpu": "two cores", "gpu": "one GPU of 80 GB"},
    minutes={"cpu": 6},
)  # fmt: skip

_CPU: dict[str, Any] = {
    "steps": 700, "seq_len": 32, "global_batch": 8, "warmup_steps": 70, "device": "cpu",
    "min_lr_ratio": 0.02, "log_every": 20,
}  # fmt: skip
_TRAIN: dict[str, dict[str, Any]] = {
    "cpu": _CPU,
    "gpu": _CPU | {"device": "cuda", "dtype": "bfloat16", "steps": 1500, "seq_len": 256,
                   "global_batch": 64, "warmup_steps": 100},
    QUICK: _CPU | {"steps": 2, "seq_len": 16, "global_batch": 4, "warmup_steps": 1},
}  # fmt: skip
_WIDTHS = {"cpu": (32, 4), "gpu": (256, 4), QUICK: (32, 4)}
_RATES = {"cpu": (5e-3, 1e-2), "gpu": (1e-3, 2e-3), QUICK: (5e-3,)}
_SAVE_EVERY = {"cpu": 0, "gpu": 250, QUICK: 0}
_VAL_WINDOWS = {"cpu": 512, "gpu": 512, QUICK: 4}


def cells(scale: str) -> list[Cell]:
    """Three seeds of every arm and learning rate, the most expensive first."""
    if scale == QUICK:
        return [_cell(arm, _RATES[scale][0], 0, scale) for arm in (LOOPED, HALF)]
    return [
        _cell(arm, lr, seed, scale)
        for arm in (LOOPED, UNROLLED, WHOLE, HALF)
        for seed in range(3)
        for lr in _RATES[scale]
    ]


def _cell(arm: str, lr: float, seed: int, scale: str) -> Cell:
    dim, heads = _WIDTHS[scale]
    model = {
        "vocab_size": VOCABULARY, "dim": dim, "n_heads": heads, "n_kv_heads": heads,
        "attn_type": "gqa", "max_seq_len": _TRAIN[scale]["seq_len"], "max_loop_iters": LOOPS,
        "n_experts": 0, "lora_rank": 0, "prelude_layers": 1, "recurrent_layers": RECURRENT,
        "coda_layers": 1, "ffn_dim": 2 * dim, "tie_embeddings": True,
    }  # fmt: skip
    run = {
        "model": model, "depth": {"plan": "fixed", "mean": LOOPS}, "optim": {"lr": lr},
        "train": _TRAIN[scale], "architecture": "looped" if arm == LOOPED else "dense",
    }  # fmt: skip
    dense = {} if arm == LOOPED else {"n_layers": LAYERS[arm]}
    settings = {
        "arm": arm,
        "lr": lr,
        "run": run,
        "val_windows": _VAL_WINDOWS[scale],
        "save_every": _SAVE_EVERY[scale],
        **dense,
    }
    return Cell(f"{arm}-lr{lr:g}", seed, settings)


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Train one model and measure its validation loss."""
    trained = train(cell, place)
    return trained.costs() | {"loss": trained.losses([LOOPS])[0]}
