"""The claim in words, and what is run."""

from __future__ import annotations

from typing import Any

from experiments.claim import QUICK, Cell, Claim, Place
from experiments.text import VOCABULARY, train

LOOPS = list(range(1, 25))
MEANS = (2, 4, 8)
FITTED = (4, 8)
"""Mean depths with enough points up to the mean for three parameters."""
FLOOR_ERROR = 0.002
FALL = 0.001

CLAIM = Claim(
    id="c5",
    title="Saturation in the number of loops",
    statement="The loss of a looped language model falls exponentially with the loops at "
    "inference and is saturated near the mean depth it was trained at.",
    source="Parcae, arXiv 2604.12946",
    literature="L(T) = L_inf + Z exp(-z T); the fitted floor L_inf within 0.2 % of the loss at "
    "the mean trained depth mu; hardly any gain much beyond mu.",
    expected="The same shape, of small height: on text and at this width one block more matters "
    "little.",
    method="Byte-level models on Python's standard library, trained with Poisson(mu) loops per "
    "sequence, mu = 2, 4, 8, full back-propagation, in two shapes: the loop alone (one looped "
    "block, nothing else), and one block each before, in and after the loop. Validation loss at "
    "1 to 24 loops. Exponential, power law with a floor and power law without are fitted to the "
    "loops up to mu and predict those beyond. mu = 2 gives too few points for a fit and is shown "
    "only.",
    pass_mark=f"A curve counts if the loss falls by more than {FALL:.1%} from one loop to mu. "
    "Holds if for every curve that counts the exponential predicts best (mean error over seeds), "
    f"its floor lies within {FLOOR_ERROR:.1%} of L(mu), and no depth beyond mu is better than "
    f"L(mu) by more than {FLOOR_ERROR:.1%}; in part if that is so for some curves; unclear if no "
    "curve counts.",
    limits="A few hundred steps of models a hundred wide: the height of the curve says nothing "
    "about large models, its form may.",
    hardware={"cpu": "two cores", "gpu": "one GPU of 80 GB"},
    minutes={"cpu": 14},
)  # fmt: skip

_SHAPES = {"loop": 0, "prelude-loop-coda": 1}
_CPU: dict[str, Any] = {
    "steps": 400, "seq_len": 64, "global_batch": 8, "warmup_steps": 40, "device": "cpu",
    "min_lr_ratio": 0.02, "log_every": 20,
}  # fmt: skip
_TRAIN: dict[str, dict[str, Any]] = {
    "cpu": _CPU,
    "gpu": _CPU | {"device": "cuda", "dtype": "bfloat16", "steps": 1500, "seq_len": 512,
                   "global_batch": 64, "warmup_steps": 100},
    QUICK: _CPU | {"steps": 4, "seq_len": 16, "global_batch": 4, "warmup_steps": 1},
}  # fmt: skip
_WIDTHS = {"cpu": (96, 4, 4e-3), "gpu": (512, 8, 1e-3), QUICK: (32, 2, 4e-3)}
_SAVE_EVERY = {"cpu": 0, "gpu": 250, QUICK: 0}
_VAL_WINDOWS = {"cpu": 256, "gpu": 512, QUICK: 4}


def cells(scale: str) -> list[Cell]:
    """Three seeds of every mean depth and shape, the deepest first."""
    if scale == QUICK:
        return [_cell("loop", 4, 0, scale)]
    shapes = list(_SHAPES) if scale == "cpu" else ["prelude-loop-coda"]
    return [
        _cell(shape, mean, seed, scale)
        for mean in reversed(MEANS)
        for seed in range(3)
        for shape in shapes
    ]


def _cell(shape: str, mean: int, seed: int, scale: str) -> Cell:
    dim, heads, lr = _WIDTHS[scale]
    model = {
        "vocab_size": VOCABULARY, "dim": dim, "n_heads": heads, "n_kv_heads": heads,
        "attn_type": "gqa", "max_seq_len": _TRAIN[scale]["seq_len"], "max_loop_iters": mean,
        "n_experts": 0, "lora_rank": 0, "prelude_layers": _SHAPES[shape],
        "coda_layers": _SHAPES[shape], "ffn_dim": 2 * dim, "tie_embeddings": True,
    }  # fmt: skip
    run = {
        "model": model, "depth": {"plan": "poisson", "mean": mean}, "optim": {"lr": lr},
        "train": _TRAIN[scale],
    }  # fmt: skip
    settings = {
        "shape": shape,
        "mu": mean,
        "run": run,
        "val_windows": _VAL_WINDOWS[scale],
        "save_every": _SAVE_EVERY[scale],
    }
    return Cell(f"{shape}-mu{mean}", seed, settings | {"loops": LOOPS})


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Train one model and measure its loss at every depth."""
    trained = train(cell, place)
    return trained.costs() | {"losses": trained.losses(cell.settings["loops"])}
