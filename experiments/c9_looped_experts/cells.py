"""The claim in words, the arms, and what is run."""

from __future__ import annotations

from typing import Any

from experiments.claim import QUICK, Cell, Claim
from experiments.text import VOCABULARY

LOOPS = (1, 2, 4)
EXPERTS = (1, 8, 16)
TOP_K = 2
TIED, UNBALANCED = "tied", "unbalanced"
"""Controls: the first loop's experts at every loop; no balancing."""
DISJOINT = 0.25

CLAIM = Claim(
    id="c9",
    title="Looped experts",
    statement="Loops pay in mixtures of experts, because a token meets different experts at each "
    "loop.",
    source="arXiv 2605.09165",
    literature="With top-2 of 8, 25 to 53 % of the tokens use disjoint sets of experts in "
    "consecutive loops; looping dense models gains less. (Independent draws of 2 of 8 would be "
    "disjoint in 54 %.)",
    expected="A larger gain from loops with experts than without; how much routing changes "
    "between the loops of so small a model is open.",
    method="Byte-level models on Python's standard library, two blocks, all looped R = 1, 2, 4 "
    "times, R fixed in training; feed-forwards of one expert (dense), top-2 of 8 and top-2 of "
    "16, with equal active parameters and no shared experts. Experts are balanced by a bias over "
    "the load of all loops. Controls at R = 4: `tied` gives a token at every loop the experts "
    "that it was given at the first, which leaves everything else as it is; `unbalanced` leaves "
    "the bias out. Measured: validation loss, and the share of tokens without a common expert in "
    "consecutive loops.",
    pass_mark="Differences are taken seed by seed and count if the mean exceeds one standard "
    "deviation. Loops pay if the loss falls from R = 1 to 4 by more with 8 and with 16 experts "
    f"than with one; routing is the reason if at least {DISJOINT:.0%} of the tokens meet disjoint "
    "sets in consecutive loops and tying the experts costs loss, with 8 experts. Holds if both, "
    "in part if one, else it does not hold.",
    limits="Width 32, tens of thousands of parameters, two hundred thousand bytes: experts "
    "hardly specialise at this size, and each learns from a part of the tokens only, so that "
    "with one loop they may be behind the dense model.",
    hardware={"cpu": "two cores", "gpu": "one GPU of 80 GB"},
    minutes={"cpu": 3},
)  # fmt: skip

_CPU: dict[str, Any] = {
    "steps": 500, "seq_len": 32, "global_batch": 8, "warmup_steps": 50, "device": "cpu",
    "min_lr_ratio": 0.02, "log_every": 20, "balance_speed": 1e-2,
}  # fmt: skip
_TRAIN: dict[str, dict[str, Any]] = {
    "cpu": _CPU,
    "gpu": _CPU | {"device": "cuda", "dtype": "bfloat16", "steps": 1500, "seq_len": 256,
                   "global_batch": 64, "warmup_steps": 100},
    QUICK: _CPU | {"steps": 3, "seq_len": 16, "global_batch": 4, "warmup_steps": 1},
}  # fmt: skip
_WIDTHS = {"cpu": (32, 4, 6e-3), "gpu": (256, 4, 2e-3), QUICK: (32, 4, 6e-3)}
_SAVE_EVERY = {"cpu": 0, "gpu": 250, QUICK: 0}
_VAL_WINDOWS = {"cpu": 512, "gpu": 512, QUICK: 4}


def cells(scale: str) -> list[Cell]:
    """Three seeds of every number of experts and loops and of the controls, deepest first."""
    if scale == QUICK:
        return [_cell(8, 2, 0, scale, TIED)]
    grid = [(experts, loops, "") for loops in reversed(LOOPS) for experts in EXPERTS]
    controls = [(8, LOOPS[-1], TIED), (8, LOOPS[-1], UNBALANCED)]
    return [
        _cell(experts, loops, seed, scale, control)
        for experts, loops, control in [*controls, *grid]
        for seed in range(3)
    ]


def arm(experts: int, loops: int, control: str = "") -> str:
    """Name of an arm."""
    return f"experts{experts}-loops{loops}" + (f"-{control}" if control else "")


def _cell(experts: int, loops: int, seed: int, scale: str, control: str) -> Cell:
    dim, heads, lr = _WIDTHS[scale]
    model = {
        "vocab_size": VOCABULARY, "dim": dim, "n_heads": heads, "n_kv_heads": heads,
        "attn_type": "gqa", "max_seq_len": _TRAIN[scale]["seq_len"], "max_loop_iters": loops,
        "lora_rank": 0, "prelude_layers": 0, "recurrent_layers": 2, "coda_layers": 0,
        "n_experts": experts if experts > 1 else 0, "n_experts_per_tok": TOP_K, "expert_dim": dim,
        "n_shared_experts": 0, "ffn_dim": TOP_K * dim, "tie_embeddings": True,
    }  # fmt: skip
    balance = {"balance_speed": 0.0} if control == UNBALANCED else {}
    run = {
        "model": model, "depth": {"plan": "fixed", "mean": loops}, "optim": {"lr": lr},
        "train": _TRAIN[scale] | balance,
    }  # fmt: skip
    settings = {
        "experts": experts, "loops": loops, "control": control, "run": run,
        "val_windows": _VAL_WINDOWS[scale], "save_every": _SAVE_EVERY[scale],
    }  # fmt: skip
    return Cell(arm(experts, loops, control), seed, settings)
