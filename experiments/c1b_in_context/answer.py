"""From accuracies to the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from experiments.c1b_in_context.cells import (
    AHEAD,
    ASKED_HOPS,
    CHOSEN_LOOPS,
    DENSE,
    DENSE_AT_MOST,
    LEARNT,
    LOOPED,
    SHALLOW_LOOPS,
    SOLVED,
    TRAINED_HOPS,
)
from experiments.claim import (
    DOES_NOT_HOLD,
    HOLDS,
    HOLDS_IN_PART,
    Record,
    Summary,
    unclear,
)
from experiments.figure import COLOURS, panels
from experiments.spread import by_arm, over_seeds


def summarise(records: Sequence[Record]) -> Summary:
    """Twice the trained hops in the looped model against the better dense one."""
    arms = by_arm(records)
    looped = arms[LOOPED]
    deep = mean(share(record, ASKED_HOPS) for record in looped)
    shallow = mean(share(record, ASKED_HOPS, SHALLOW_LOOPS) for record in looped)
    learnt = mean(share(record, TRAINED_HOPS) for record in looped)
    dense = max(mean(share(record, ASKED_HOPS) for record in arms[arm]) for arm in DENSE)
    if learnt < LEARNT:
        verdict = unclear("reading facts was not learnt in these steps; more of them would tell")
    elif deep >= SOLVED and dense <= DENSE_AT_MOST:
        verdict = HOLDS
    else:
        verdict = HOLDS_IN_PART if deep - dense >= AHEAD else DOES_NOT_HOLD
    ask = looped[0].settings["ask"]
    return Summary(
        verdict,
        f"Trained on up to {TRAINED_HOPS} hops through facts of the prompt, the looped model "
        f"answers {learnt:.1%} of {TRAINED_HOPS} hops and {deep:.1%} of {ASKED_HOPS} at "
        f"{CHOSEN_LOOPS} loops, {shallow:.1%} at {SHALLOW_LOOPS} loops; the better dense arm "
        f"{dense:.1%}.",
        f"{ASKED_HOPS} hops {deep:.1%}, dense {dense:.1%}",
        ("arm", "seeds", "parameters", "last loss", *(f"{hops} hops" for hops in ask["hops"])),
        [_row(arm, found) for arm, found in arms.items()],
        {"hops": ask["hops"], "loops": ask["loops"],
         "grid": [[mean(r.figures["grid"][i][j] for r in looped) for j in range(len(ask["loops"]))]
                  for i in range(len(ask["hops"]))],
         "arms": {arm: [mean(share(r, hops) for r in found) for hops in ask["hops"]]
                  for arm, found in arms.items()}},
    )  # fmt: skip


def share(record: Record, hops: int, loops: int = CHOSEN_LOOPS) -> float:
    """Share of the chains of ``hops`` answered at ``loops``; a dense model has no loops."""
    ask = record.settings["ask"]
    row = record.figures["grid"][ask["hops"].index(hops)]
    return row[ask["loops"].index(loops)] if len(row) > 1 else row[0]


def plot(summary: Summary, path: Path) -> None:
    """The looped model over hops and loops, and all arms over hops."""
    data = summary.data
    with panels(path, 2) as (grid, arms):
        for hops, shares, colour in zip(data["hops"], data["grid"], COLOURS, strict=False):
            grid.plot(data["loops"], shares, "o-", color=colour, ms=4, label=f"{hops} hops")
        grid.set_xscale("log", base=2)
        grid.set_xticks(data["loops"], [str(n) for n in data["loops"]])
        grid.set(title="Looped, facts in the prompt", xlabel="loops", ylabel="answered",
                 ylim=(0, 1.03))  # fmt: skip
        grid.legend(fontsize=8)
        for (arm, shares), colour in zip(data["arms"].items(), COLOURS, strict=False):
            arms.plot(data["hops"], shares, "o-", color=colour, ms=4, label=arm)
        arms.axvspan(0.5, TRAINED_HOPS, color=COLOURS[0], alpha=0.07, lw=0)
        arms.set(title=f"All arms, looped at {CHOSEN_LOOPS} loops",
                 xlabel="hops (shaded: seen in training)", ylim=(0, 1.03))  # fmt: skip
        arms.legend()


def _row(arm: str, found: Sequence[Record]) -> tuple[str, ...]:
    loss = mean(record.figures["curve"][-1][1] for record in found)
    return (
        arm, str(len(found)), f"{found[0].figures['parameters']:,}", f"{loss:.3f}",
        *(_cell(found, hops) for hops in found[0].settings["ask"]["hops"]),
    )  # fmt: skip


def _cell(found: Sequence[Record], hops: int) -> str:
    middle, spread = over_seeds(found, lambda record: share(record, hops))
    return f"{middle:.1%} ± {100 * spread:.1f}"
