"""The numbers of the claim, the arms, and what is run."""

from __future__ import annotations

from typing import Any

from experiments.claim import QUICK, Cell, Claim, sweep
from experiments.tasks import SMALL, ComposedFacts, PermHop

TASK = ComposedFacts(PermHop(entities=64, relations=8), lone_share=0.2)
HOPS, LONGER = 2, 3
CHOSEN_LOOPS = 16
SOLVED, DENSE_AT_MOST, AHEAD_POINTS, LEARNT = 0.80, 0.25, 25, 0.90
LOOPED, BETWEEN = "looped", "looped-between-layers"
DENSE = ("dense", "dense-lr1e-3", "dense-equal-depth")
"""The verdict is against the best of them."""

# two dense layers, which two hops need, hold as many parameters as the one that is looped
_DENSE = {"architecture": "dense", "layers": 2, "ffn": 171}
ARMS: dict[str, tuple[int, dict[str, Any]]] = {
    LOOPED: (3, {}),
    BETWEEN: (3, {"around": 1, "ffn": 256}),
    "dense": (3, _DENSE),
    "dense-lr1e-3": (1, _DENSE | {"lr": 1e-3}),
    "dense-equal-depth": (3, _DENSE | {"layers": 6, "ffn": 512, "lr": 1e-3}),
}
"""Arm -> seeds, and what differs from the looped model."""

CLAIM = Claim.read(__file__, vars())

_RUNS = {
    "cpu": {"dim": 128, "batch": 256, "steps": 800, "every": 40, "followed": 256, "most": 2048},
    QUICK: {"dim": 16, "batch": 16, "steps": 4, "every": 2, "followed": 16, "most": 16},
}


def cells(scale: str) -> list[Cell]:
    """Return every arm with its seeds."""
    arms = {LOOPED: 1, "dense": 1} if scale == QUICK else {arm: n for arm, (n, _) in ARMS.items()}
    settings = {arm: _settings(scale, **ARMS[arm][1]) for arm in arms}
    return [cell for arm, n in arms.items() for cell in sweep({arm: settings[arm]}, range(n))]


def _settings(
    scale: str,
    *,
    architecture: str = "looped",
    around: int = 0,
    layers: int | None = None,
    ffn: int = 512,
    lr: float = 2e-3,
) -> dict[str, Any]:
    sizes = _RUNS[scale]
    run = {
        "architecture": architecture,
        "model": SMALL | {
            "vocab_size": TASK.graph.vocab_size, "dim": sizes["dim"], "max_seq_len": 16,
            "max_loop_iters": 8, "prelude_layers": around, "coda_layers": around, "ffn_dim": ffn,
            "tie_embeddings": True, "readout": False,
        },
        "depth": {"plan": "uniform", "low": 4, "high": 8},
        "optim": {"lr": lr, "beta2": 0.98, "weight_decay": 0.5},
        "train": {
            "steps": sizes["steps"], "warmup_steps": sizes["steps"] // 40, "seq_len": HOPS + 1,
            "global_batch": sizes["batch"], "min_lr_ratio": 0.02, "log_every": sizes["every"],
            "eval_every": sizes["every"], "device": "cpu",
        },
    }  # fmt: skip
    ask = {"hops": [HOPS, LONGER], "loops": [2, 4, 8, CHOSEN_LOOPS, 32], "at": 8,
           "followed": sizes["followed"], "most": sizes["most"]}  # fmt: skip
    return {"run": run, "layers": layers, "ask": ask}
