"""The numbers of the claim, the arms, and what is run."""

from __future__ import annotations

from typing import Any

from experiments.claim import QUICK, Cell, Claim, sweep
from experiments.text import Sizes

LOOPS = (1, 2, 4)
EXPERTS = (1, 8, 16)
TOP_K = 2
TIED, UNBALANCED = "tied", "unbalanced"
"""Controls: the first loop's experts at every loop; no balancing."""
DISJOINT = 0.25

CLAIM = Claim.read(__file__, vars())
_SIZES = Sizes(
    train={"steps": 500, "seq_len": 32, "warmup_steps": 50, "balance_speed": 1e-2},
    widths={"cpu": (32, 4), "gpu": (256, 4), QUICK: (32, 4)},
    val_windows=512, gpu_seq_len=256, quick_steps=3,
)  # fmt: skip


def cells(scale: str) -> list[Cell]:
    """Return three seeds of every number of experts and loops and of the controls."""
    if scale == QUICK:
        return sweep({arm(8, 2, TIED): _settings(8, 2, TIED, scale)}, [0])
    deepest = LOOPS[-1]
    grid = [(experts, loops, "") for loops in reversed(LOOPS) for experts in EXPERTS]
    grid = [(8, deepest, TIED), (8, deepest, UNBALANCED), *grid]
    return sweep({arm(*point): _settings(*point, scale) for point in grid})


def arm(experts: int, loops: int, control: str = "") -> str:
    """Name an arm."""
    return f"experts{experts}-loops{loops}" + (f"-{control}" if control else "")


def _settings(experts: int, loops: int, control: str, scale: str) -> dict[str, Any]:
    model = {
        "max_loop_iters": loops, "prelude_layers": 0, "recurrent_layers": 2, "coda_layers": 0,
        "n_experts": experts if experts > 1 else 0, "n_experts_per_tok": TOP_K,
        "n_shared_experts": 0, "expert_dim": _SIZES.widths[scale][0],
    }  # fmt: skip
    settings = _SIZES.settings(
        scale, model=model, depth={"plan": "fixed", "mean": loops},
        lr=2e-3 if scale == "gpu" else 6e-3,
        train={"balance_speed": 0.0} if control == UNBALANCED else {},
    )  # fmt: skip
    return {"experts": experts, "loops": loops, "control": control, **settings}
