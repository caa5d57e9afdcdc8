"""From accuracies to the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from experiments.c1_depth.cells import (
    DECAY_POINTS,
    DENSE,
    DENSE_AT_MOST,
    DENSE_RIVALS,
    LEARNABLE,
    LOOPED,
    MANY_LOOPS,
    MOST_LOOPS,
    PART,
    RULES,
    SHALLOW,
    SHALLOW_LOOPS,
    SOLVED,
)
from experiments.c1_depth.recipe import ASKED_HOPS, CHOSEN_LOOPS, TRAINED_HOPS
from experiments.claim import Record, Summary, verdict
from experiments.spread import by_arm, columns, each, share, span

_SHOWN = (SHALLOW_LOOPS, 10, CHOSEN_LOOPS, MANY_LOOPS, MOST_LOOPS)


def summarise(records: Sequence[Record]) -> Summary:
    """Judge chains of twice the trained length: at the chosen depth, few loops, many; dense."""
    arms = by_arm(records)
    looped = arms[LOOPED]
    at_chosen, shallow, many = (
        [asked(record, loops) for record in looped]
        for loops in (CHOSEN_LOOPS, SHALLOW_LOOPS, MANY_LOOPS)
    )
    lost = max(columns(r.figures["longest"] for r in looped)) - mean(many)
    dense = {arm: mean(each(arms[arm], asked)) for arm in DENSE_RIVALS}
    solved = min(at_chosen) >= SOLVED and mean(shallow) <= SHALLOW
    rivals_fail = max(dense.values()) <= DENSE_AT_MOST
    by_rule = "; ".join(f"`{rule}` {_by_rule(looped, rule)}" for rule in RULES)
    return Summary(
        verdict(
            solved and rivals_fail and lost <= DECAY_POINTS / 100,
            mean(at_chosen) > PART and rivals_fail,
        ),
        f"Trained on up to {TRAINED_HOPS} hops, the looped model answers {mean(at_chosen):.1%} of "
        f"the unseen chains of {ASKED_HOPS} at {CHOSEN_LOOPS} loops (worst seed "
        f"{min(at_chosen):.1%}), {mean(shallow):.1%} at {SHALLOW_LOOPS} loops and "
        f"{mean(many):.1%} at {MANY_LOOPS} ({100 * lost:.1f} points below its best depth). Dense "
        f"models answer {span(list(dense.values()), '.1%')}; trained on {ASKED_HOPS} hops, "
        f"{asked(arms[LEARNABLE][0]):.1%}. Depth chosen by a rule: {by_rule}.",
        f"{mean(at_chosen):.1%} at {CHOSEN_LOOPS} loops, dense {span(list(dense.values()), '.1%')}",
        ("arm", "seeds", "parameters", "training FLOPs",
         f"{TRAINED_HOPS} hops at {CHOSEN_LOOPS} loops",
         *(f"{ASKED_HOPS} hops at {loops} loops" for loops in _SHOWN)),
        [_row(arm, found) for arm, found in arms.items()],
        _picture(looped, arms),
    )  # fmt: skip


def asked(record: Record, loops: int = 0, hops: int = ASKED_HOPS) -> float:
    """Share of the chains of ``hops`` answered at ``loops``; a dense model has no loops."""
    ask, figures = record.settings["ask"], record.figures
    row = figures["longest"] if hops == ASKED_HOPS else figures["grid"][ask["hops"].index(hops)]
    return row[ask["loops"].index(loops)] if len(row) > 1 else row[0]


def _by_rule(looped: Sequence[Record], rule: str) -> str:
    place = looped[0].settings["ask"]["rule_hops"].index(ASKED_HOPS)
    found = [record.figures["rules"][rule][place] for record in looped]
    right, loops = (mean(one[key] for one in found) for key in ("accuracy", "loops"))
    return f"{right:.1%} with {loops:.1f} loops on average"


def _row(arm: str, found: Sequence[Record]) -> tuple[str, ...]:
    dense = len(found[0].figures["longest"]) == 1
    return (
        arm, str(len(found)), f"{found[0].figures['parameters']:,}",
        f"{found[0].figures['training_flops']:.1e}",
        _share(found, CHOSEN_LOOPS, TRAINED_HOPS),
        *("-" if dense and n != CHOSEN_LOOPS else _share(found, n) for n in _SHOWN),
    )  # fmt: skip


def _share(found: Sequence[Record], loops: int, hops: int = ASKED_HOPS) -> str:
    return share(found, lambda record: asked(record, loops, hops))


def _picture(looped: Sequence[Record], arms: dict[str, list[Record]]) -> dict[str, Any]:
    ask = looped[0].settings["ask"]
    dense = arms[DENSE][0].settings["ask"]["hops"]
    return {
        "hops": ask["hops"],
        "loops": ask["loops"],
        "grid": [
            columns([record.figures["grid"][i] for record in looped])
            for i in range(len(ask["hops"]))
        ],
        "dense_hops": dense,
        "dense": {
            arm: [mean(asked(r, 0, hops) for r in arms[arm]) for hops in dense]
            for arm in (*DENSE_RIVALS, LEARNABLE)
        },
        "depths": {
            arm: (found[0].settings["ask"]["loops"], columns([r.figures["longest"] for r in found]))
            for arm, found in arms.items() if len(found[0].figures["longest"]) > 1
        },
    }  # fmt: skip
