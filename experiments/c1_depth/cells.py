"""The numbers of the claim, the arms, and what is run."""

from __future__ import annotations

from typing import Any

from experiments.c1_depth.recipe import ASKED_HOPS, CHOSEN_LOOPS, PAIRS_AFTER, TRAINED_HOPS, recipe
from experiments.claim import QUICK, Cell, Claim, sweep

SOLVED, SHALLOW, DENSE_AT_MOST, PART, DECAY_POINTS = 0.95, 0.60, 0.25, 0.50, 2
SHALLOW_LOOPS, MANY_LOOPS, MOST_LOOPS = TRAINED_HOPS, 64, 128
RULES = ("change:0.05", "kl:0.0001,0.1")
LOOPED, DENSE, LEARNABLE = "looped", "dense", "dense-equal-depth-10-hops"
DENSE_RIVALS = (DENSE, "dense-lr1e-3", "dense-lr4e-3", "dense-equal-flops", "dense-equal-depth")
"""Dense models trained on the same chains; the verdict is against the best of them."""

_DENSE = {"architecture": "dense", "train.grad_loops": None}
_DEEP = _DENSE | {"unrolled": 10, "optim.lr": 1e-3}
_NO_LONG = {"depth.long_share": 0.0}
_SINGLE = {"pairs_after": None}
ARMS: dict[str, tuple[int, dict[str, Any]]] = {
    LOOPED: (5, {}),
    "single-chains": (1, _SINGLE),
    "no-long-steps": (1, _NO_LONG),
    "fixed-8-loops": (1, _NO_LONG | {"depth.plan": "fixed", "depth.mean": 8.0}),
    "loops-2-to-4": (1, _NO_LONG | {"depth.low": 2, "depth.high": 4}),
    "every-loop": (1, _NO_LONG | {"depth.low": 1}),
    "no-injection": (1, {"injection": False, "model.initial_state": "prelude"}),
    "final-answer-only": (1, {"final_only": True}),
    DENSE: (5, _DENSE),
    "dense-lr1e-3": (1, _DENSE | {"optim.lr": 1e-3}),
    "dense-lr4e-3": (1, _DENSE | {"optim.lr": 4e-3}),
    "dense-equal-flops": (1, _DENSE | {"steps": 3.5}),
    "dense-equal-depth": (1, _DEEP),
    LEARNABLE: (1, _DEEP | _SINGLE | {"hops": ASKED_HOPS}),
}
"""Arm -> seeds, and what differs from the recipe: fields of its run by "section.field", and
"steps" (a factor), "pairs_after", "hops", "final_only", "unrolled", "injection"."""

CLAIM = Claim.read(__file__, vars())


def cells(scale: str) -> list[Cell]:
    """Return every arm with its seeds, the longest first."""
    arms = {LOOPED: 1, DENSE: 1} if scale == QUICK else {arm: n for arm, (n, _) in ARMS.items()}
    settings = {arm: _settings(arm, quick=scale == QUICK) for arm in arms}
    return [cell for arm, n in arms.items() for cell in sweep({arm: settings[arm]}, range(n))]


def _settings(arm: str, *, quick: bool) -> dict[str, Any]:
    changes = dict(ARMS[arm][1])
    run = recipe(quick=quick)
    hops, pairs_after = changes.pop("hops", TRAINED_HOPS), changes.pop("pairs_after", PAIRS_AFTER)
    run.train.steps = round(run.train.steps * changes.pop("steps", 1))
    task = {
        "hops": hops,
        "pair_from": None if pairs_after is None else round(pairs_after * run.train.steps),
        "final_only": changes.pop("final_only", False),
        "unrolled": changes.pop("unrolled", None),
        "injection": changes.pop("injection", True),
    }
    values = run.to_dict()
    for name, value in changes.items():
        section, _, key = name.rpartition(".")
        (values[section] if section else values)[key] = value
    del values["train"]["seed"], values["data"]
    whole = arm == LOOPED
    ask = {
        "hops": list(range(2, 16)) if whole else [2, TRAINED_HOPS, 8, ASKED_HOPS, 12],
        "loops": [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, CHOSEN_LOOPS, 32, 48, MANY_LOOPS, 96,
                  MOST_LOOPS],
        "programs": 2048, "longest": ASKED_HOPS, "longest_programs": 10240,
        "rules": list(RULES) if whole else [], "rule_hops": [TRAINED_HOPS, ASKED_HOPS],
        "most_loops": MANY_LOOPS,
    }  # fmt: skip
    if quick:
        ask |= {"hops": [2, 6], "loops": [1, 4], "programs": 200, "longest_programs": 200,
                "most_loops": 4}  # fmt: skip
    return {"run": values, **task, "ask": ask}
