"""The numbers of the claim, the arms, and what is run."""

from __future__ import annotations

from typing import Any

from experiments.claim import QUICK, Cell, Claim, sweep
from experiments.tasks import SMALL, InContextHop

TASK = InContextHop(entities=16, stated=8)
TRAINED_HOPS, ASKED_HOPS = 3, 6
CHOSEN_LOOPS, SHALLOW_LOOPS = 12, 3
SOLVED, DENSE_AT_MOST, AHEAD_POINTS, LEARNT = 0.90, 0.40, 20, 0.90
LOOPED = "looped"
DENSE = ("dense", "dense-equal-depth")
"""The verdict is against the better one."""

_DENSE = {"architecture": "dense", "grad_loops": None}
_ARMS: dict[str, dict[str, Any]] = {
    LOOPED: {}, "dense": _DENSE, "dense-equal-depth": _DENSE | {"unrolled": 6, "lr": 1e-3}
}  # fmt: skip
CHANCE = 1 / TASK.stated

CLAIM = Claim.read(__file__, vars())

_RUNS = {
    "cpu": {"dim": 64, "batch": 128, "steps": 2000, "every": 50, "rows": 1024},
    QUICK: {"dim": 16, "batch": 8, "steps": 4, "every": 2, "rows": 16},
}


def cells(scale: str) -> list[Cell]:
    """Return every arm with every seed."""
    quick = scale == QUICK
    arms = [LOOPED, "dense-equal-depth"] if quick else _ARMS
    found = {arm: _settings(scale, **_ARMS[arm]) for arm in arms}
    return sweep(found, [0] if quick else range(3))


def _settings(
    scale: str,
    *,
    architecture: str = "looped",
    unrolled: int | None = None,
    lr: float = 2e-3,
    grad_loops: int | None = 6,
) -> dict[str, Any]:
    sizes = _RUNS[scale]
    run = {
        "architecture": architecture,
        "model": SMALL | {
            "vocab_size": TASK.vocab_size, "dim": sizes["dim"], "max_seq_len": 32,
            "max_loop_iters": 6, "prelude_layers": 0, "coda_layers": 0, "recurrent_layers": 2,
            "ffn_dim": 2 * sizes["dim"],
        },
        "depth": {"plan": "uniform", "low": 3, "high": 6, "long_share": 0.3, "long_loops": 16},
        "optim": {"lr": lr, "beta2": 0.98},
        "train": {
            "steps": sizes["steps"], "warmup_steps": sizes["steps"] // 20,
            "seq_len": TASK.stated + TRAINED_HOPS, "global_batch": sizes["batch"],
            "min_lr_ratio": 0.02, "grad_loops": grad_loops, "log_every": sizes["every"],
            "device": "cpu",
        },
    }  # fmt: skip
    # from as many hops as there are facts on, the cycle starts over
    ask = {"hops": list(range(1, TASK.stated)), "loops": [1, 2, 3, 4, 6, 8, CHOSEN_LOOPS, 16, 32],
           "rows": sizes["rows"]}  # fmt: skip
    return {"run": run, "unrolled": unrolled, "ask": ask}
