"""The numbers of the claim, the arms, and what is run."""

from __future__ import annotations

from typing import Any

from experiments.claim import QUICK, Cell, Claim, Place, sweep
from experiments.text import Sizes, train

LOOPS = 8
ONCE, RECURRENT = 2, 4
LOOPED = "looped"
WHOLE, HALF, UNROLLED = "dense-12", "dense-6", "dense-34"
LAYERS = {HALF: ONCE + RECURRENT, WHOLE: 2 * (ONCE + RECURRENT), UNROLLED: ONCE + RECURRENT * LOOPS}
"""Dense arm -> blocks: as many as the looped model stores, twice that, as many as it executes."""
PHI = 0.46
EQUIVALENT = ONCE + LOOPS**PHI * RECURRENT
PART = 0.5

CLAIM = Claim.read(__file__, vars())
_SIZES = Sizes(
    train={"steps": 700, "seq_len": 32, "warmup_steps": 70},
    widths={"cpu": (32, 4), "gpu": (256, 4), QUICK: (32, 4)},
    val_windows=512, gpu_seq_len=256, quick_steps=2,
)  # fmt: skip
_RATES = {"cpu": (5e-3, 1e-2), "gpu": (1e-3, 2e-3), QUICK: (5e-3,)}


def cells(scale: str) -> list[Cell]:
    """Return three seeds of every arm and learning rate, the most expensive first."""
    quick = scale == QUICK
    arms = (LOOPED, HALF) if quick else (LOOPED, UNROLLED, WHOLE, HALF)
    grid = [(arm, lr) for arm in arms for lr in _RATES[scale]]
    found = {f"{arm}-lr{lr:g}": _settings(arm, lr, scale) for arm, lr in grid}
    return sweep(found, [0] if quick else range(3))


def _settings(arm: str, lr: float, scale: str) -> dict[str, Any]:
    looped = arm == LOOPED
    settings = _SIZES.settings(
        scale, lr=lr, depth={"plan": "fixed", "mean": LOOPS},
        model={"max_loop_iters": LOOPS, "prelude_layers": 1, "recurrent_layers": RECURRENT,
               "coda_layers": 1},
        architecture="looped" if looped else "dense",
    )  # fmt: skip
    return {"arm": arm, "lr": lr, **settings} | ({} if looped else {"n_layers": LAYERS[arm]})


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Train one model and measure its validation loss."""
    trained = train(cell, place)
    return trained.costs() | {"loss": trained.losses([LOOPS])[0]}
