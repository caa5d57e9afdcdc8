"""From accuracies to the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from experiments.c1_depth.cells import (
    DECAY,
    DENSE,
    DENSE_AT_MOST,
    DENSE_RIVALS,
    LEARNABLE,
    LOOPED,
    MANY_LOOPS,
    MOST_LOOPS,
    RULES,
    SHALLOW,
    SHALLOW_LOOPS,
    SOLVED,
)
from experiments.c1_depth.recipe import ASKED_HOPS, CHOSEN_LOOPS, TRAINED_HOPS
from experiments.claim import (
    DOES_NOT_HOLD,
    HOLDS,
    HOLDS_IN_PART,
    Record,
    Summary,
)
from experiments.spread import by_arm, over_seeds

_SHOWN = (SHALLOW_LOOPS, 10, CHOSEN_LOOPS, MANY_LOOPS, MOST_LOOPS)


def summarise(records: Sequence[Record]) -> Summary:
    """Chains of twice the trained length: at the chosen depth, at few loops, at many; dense."""
    arms = by_arm(records)
    looped = arms[LOOPED]
    at_chosen = [asked(record, CHOSEN_LOOPS) for record in looped]
    shallow = mean(asked(record, SHALLOW_LOOPS) for record in looped)
    many = mean(asked(record, MANY_LOOPS) for record in looped)
    best = max(_means([record.figures["longest"] for record in looped]))
    dense = {arm: mean(asked(record) for record in arms[arm]) for arm in DENSE_RIVALS}
    solved = min(at_chosen) >= SOLVED and shallow <= SHALLOW
    rivals_fail = max(dense.values()) <= DENSE_AT_MOST
    if solved and rivals_fail and best - many <= DECAY:
        verdict = HOLDS
    elif mean(at_chosen) > 2 * DENSE_AT_MOST and rivals_fail:
        verdict = HOLDS_IN_PART
    else:
        verdict = DOES_NOT_HOLD
    by_rule = "; ".join(f"`{rule}` {_by_rule(looped, rule)}" for rule in RULES)
    return Summary(
        verdict,
        f"Trained on up to {TRAINED_HOPS} hops, the looped model answers {mean(at_chosen):.1%} of "
        f"the unseen chains of {ASKED_HOPS} at {CHOSEN_LOOPS} loops (worst seed "
        f"{min(at_chosen):.1%}), {shallow:.1%} at {SHALLOW_LOOPS} loops and {many:.1%} at "
        f"{MANY_LOOPS} ({100 * (best - many):.1f} points below its best depth). Dense models "
        f"answer {_range(list(dense.values()))}; trained on {ASKED_HOPS} hops, "
        f"{asked(arms[LEARNABLE][0]):.1%}. Depth chosen by a rule: {by_rule}.",
        f"{mean(at_chosen):.1%} at {CHOSEN_LOOPS} loops, dense {_range(list(dense.values()))}",
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
    share, loops = mean(each["accuracy"] for each in found), mean(each["loops"] for each in found)
    return f"{share:.1%} with {loops:.1f} loops on average"


def _row(arm: str, found: Sequence[Record]) -> tuple[str, ...]:
    dense = len(found[0].figures["longest"]) == 1
    return (
        arm, str(len(found)), f"{found[0].figures['parameters']:,}",
        f"{found[0].figures['training_flops']:.1e}",
        _shown(found, CHOSEN_LOOPS, TRAINED_HOPS),
        *("-" if dense and n != CHOSEN_LOOPS else _shown(found, n) for n in _SHOWN),
    )  # fmt: skip


def _shown(found: Sequence[Record], loops: int, hops: int = ASKED_HOPS) -> str:
    middle, spread = over_seeds(found, lambda record: asked(record, loops, hops))
    return f"{middle:.1%}" + (f" ± {100 * spread:.1f}" if len(found) > 1 else "")


def _range(shares: Sequence[float]) -> str:
    low, high = f"{min(shares):.1%}", f"{max(shares):.1%}"
    return low if low == high else f"{low} to {high}"


def _picture(looped: Sequence[Record], arms: dict[str, list[Record]]) -> dict[str, Any]:
    ask = looped[0].settings["ask"]
    dense = arms[DENSE][0].settings["ask"]["hops"]
    return {
        "hops": ask["hops"],
        "loops": ask["loops"],
        "grid": [
            _means([record.figures["grid"][i] for record in looped])
            for i in range(len(ask["hops"]))
        ],
        "dense_hops": dense,
        "dense": {
            arm: [mean(asked(r, 0, hops) for r in arms[arm]) for hops in dense]
            for arm in (*DENSE_RIVALS, LEARNABLE)
        },
        "depths": {
            arm: (found[0].settings["ask"]["loops"], _means([r.figures["longest"] for r in found]))
            for arm, found in arms.items() if len(found[0].figures["longest"]) > 1
        },
    }  # fmt: skip


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    """Mean over the seeds of each column."""
    return [mean(column) for column in zip(*rows, strict=True)]
