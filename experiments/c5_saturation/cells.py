"""The numbers of the claim, and what is run."""

from __future__ import annotations

from typing import Any

from experiments.claim import QUICK, Cell, Claim, Place, sweep
from experiments.text import Sizes, train

LOOPS = list(range(1, 25))
MEANS = (2, 4, 8)
FITTED = (4, 8)
"""Mean depths with enough points up to the mean for three parameters."""
FLOOR_ERROR = 0.002
FALL = 0.001

CLAIM = Claim.read(__file__, vars())
_SIZES = Sizes(
    train={"steps": 400, "seq_len": 64, "warmup_steps": 40},
    widths={"cpu": (96, 4), "gpu": (512, 8), QUICK: (32, 2)},
    val_windows=256, gpu_seq_len=512, quick_steps=4,
)  # fmt: skip
_SHAPES = {"loop": 0, "prelude-loop-coda": 1}
"""Shape -> blocks before and after the loop."""


def cells(scale: str) -> list[Cell]:
    """Return three seeds of every mean depth and shape, the deepest first."""
    if scale == QUICK:
        return sweep({"loop-mu4": _settings("loop", 4, scale)}, [0])
    shapes = list(_SHAPES) if scale == "cpu" else ["prelude-loop-coda"]
    grid = [(shape, mean) for mean in reversed(MEANS) for shape in shapes]
    return sweep({f"{shape}-mu{mean}": _settings(shape, mean, scale) for shape, mean in grid})


def _settings(shape: str, mean: int, scale: str) -> dict[str, Any]:
    around = _SHAPES[shape]
    settings = _SIZES.settings(
        scale, model={"max_loop_iters": mean, "prelude_layers": around, "coda_layers": around},
        depth={"plan": "poisson", "mean": mean}, lr=1e-3 if scale == "gpu" else 4e-3,
    )  # fmt: skip
    return {"shape": shape, "mu": mean, **settings, "loops": LOOPS}


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Train one model and measure its loss at every depth."""
    trained = train(cell, place)
    return trained.costs() | {"losses": trained.losses(cell.settings["loops"])}
