"""The claim in words, the arms, and what is run."""

from __future__ import annotations

from typing import Any

from experiments.c1_depth.recipe import (
    ASKED_HOPS,
    CHOSEN_LOOPS,
    PAIRS_AFTER,
    TRAINED_HOPS,
    recipe,
)
from experiments.claim import QUICK, Cell, Claim

SOLVED, SHALLOW, DENSE_AT_MOST, DECAY = 0.95, 0.60, 0.25, 0.02
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

CLAIM = Claim(
    id="c1",
    title="Depth that extrapolates",
    statement=f"A looped transformer trained on chains of up to {TRAINED_HOPS} relations answers "
    f"chains of {ASKED_HOPS} by looping more; a dense transformer does not.",
    source="Loop, Think, & Generalize, arXiv 2604.07822",
    literature="Looped models trained on up to 5 hops reach 10 with more iterations, and too "
    "many iterations make their answers worse again (overthinking); dense transformers fail "
    "beyond the trained length.",
    expected="A frontier of about one hop per loop. A plain recipe falls short of the mark and "
    "decays at many loops; with pairs of chains and long steps it should do neither.",
    method="16 entities, 8 relations, each a fixed random permutation; `<e> <r1> ... <rk>` is "
    "labelled after every relation with the entity reached. A tenth of the prefixes, chosen by a "
    "hash, is never labelled: these are what is asked. One prelude, one looped and one coda "
    "block of width 128, loops drawn from 5 to 10 for each row, loss at the last loop; after "
    f"{PAIRS_AFTER:.0%} of the steps rows hold two chains of {TRAINED_HOPS} relations; 30 % of "
    "the steps begin from the state after up to 32 further loops. The dense arms see the same "
    "chains: with as many parameters; with as many training FLOPs (3.5 times the steps); with "
    "one layer for every block that 10 loops run; and that one trained on single chains of "
    f"{ASKED_HOPS}. The dense model also gets two other learning rates (1e-3, 4e-3), the looped "
    "one only the recipe's 2e-3. Other arms take away one part of the recipe: single chains "
    "throughout; no long steps; and, without long steps, 8 loops always, 2 to 4 loops, or 1 to 10 "
    "loops (the loss at every loop, in expectation); B e = 0, with the input as h_0; labels on "
    "last relations only. Five seeds for the looped and the dense model, one for the others.",
    pass_mark=f"Of held-out chains of {ASKED_HOPS}: holds if every looped seed answers at least "
    f"{SOLVED:.0%} at {CHOSEN_LOOPS} loops, a depth fixed before the runs, and on average at most "
    f"{SHALLOW:.0%} at {SHALLOW_LOOPS} loops; every dense arm trained on {TRAINED_HOPS} hops "
    f"answers at most {DENSE_AT_MOST:.0%}; and at {MANY_LOOPS} loops, 8 times the trained mean, "
    f"at most {100 * DECAY:g} points are lost against the best depth. In part if the looped mean "
    f"at {CHOSEN_LOOPS} loops is above {2 * DENSE_AT_MOST:.0%} and the dense arms are at most at "
    f"{DENSE_AT_MOST:.0%}. Otherwise it does not hold.",
    limits="A synthetic task that a loop fits by construction, with supervision of every hop: it "
    "shows that depth can extrapolate, not that it does so on text. The recipe was chosen in trial "
    "runs on the same relations, so the seeds vary weights, depths and order, not the task. Arms "
    "of a single seed show a direction, not a size.",
    hardware={"cpu": "two cores"},
    minutes={"cpu": 35},
)  # fmt: skip

_HOPS = list(range(2, 16))
_LOOPS = [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, CHOSEN_LOOPS, 32, 48, MANY_LOOPS, 96, MOST_LOOPS]


def cells(scale: str) -> list[Cell]:
    """Every arm with its seeds, the longest first."""
    if scale == QUICK:
        return [_cell(LOOPED, 0, scale), _cell(DENSE, 0, scale)]
    return [_cell(arm, seed, scale) for arm, (seeds, _) in ARMS.items() for seed in range(seeds)]


def _cell(arm: str, seed: int, scale: str) -> Cell:
    quick, changes = scale == QUICK, dict(ARMS[arm][1])
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
        "hops": _HOPS if whole else [2, TRAINED_HOPS, 8, ASKED_HOPS, 12],
        "loops": _LOOPS,
        "programs": 2048, "longest": ASKED_HOPS, "longest_programs": 10240,
        "rules": list(RULES) if whole else [], "rule_hops": [TRAINED_HOPS, ASKED_HOPS],
        "most_loops": MANY_LOOPS,
    }  # fmt: skip
    if quick:
        ask |= {"hops": [2, 6], "loops": [1, 4], "programs": 200, "longest_programs": 200,
                "most_loops": 4}  # fmt: skip
    return Cell(arm, seed, {"run": values, **task, "ask": ask})
