"""From accuracies to the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean

from experiments.c1b_in_context.cells import (
    AHEAD_POINTS,
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
from experiments.claim import Record, Summary, verdict
from experiments.figure import COLOURS, lines, log2_ticks, panels
from experiments.spread import by_arm, columns, each, share


def summarise(records: Sequence[Record]) -> Summary:
    """Twice the trained hops in the looped model against the better dense one."""
    arms = by_arm(records)
    looped = arms[LOOPED]
    deep = _mean(looped, ASKED_HOPS)
    shallow = _mean(looped, ASKED_HOPS, SHALLOW_LOOPS)
    learnt = _mean(looped, TRAINED_HOPS)
    dense = max(_mean(arms[arm], ASKED_HOPS) for arm in DENSE)
    ask = looped[0].settings["ask"]
    return Summary(
        verdict(
            deep >= SOLVED and dense <= DENSE_AT_MOST,
            100 * (deep - dense) >= AHEAD_POINTS,
            unclear="" if learnt >= LEARNT
            else "reading facts was not learnt in these steps; more of them would tell",
        ),
        f"Trained on up to {TRAINED_HOPS} hops through facts of the prompt, the looped model "
        f"answers {learnt:.1%} of {TRAINED_HOPS} hops and {deep:.1%} of {ASKED_HOPS} at "
        f"{CHOSEN_LOOPS} loops, {shallow:.1%} at {SHALLOW_LOOPS} loops; the better dense arm "
        f"{dense:.1%}.",
        f"{ASKED_HOPS} hops {deep:.1%}, dense {dense:.1%}",
        ("arm", "seeds", "parameters", "last loss", *(f"{hops} hops" for hops in ask["hops"])),
        [_row(arm, found) for arm, found in arms.items()],
        {"hops": ask["hops"], "loops": ask["loops"],
         "grid": [columns(r.figures["grid"][i] for r in looped) for i in range(len(ask["hops"]))],
         "arms": {arm: [_mean(found, hops) for hops in ask["hops"]]
                  for arm, found in arms.items()}},
    )  # fmt: skip


def answered(record: Record, hops: int, loops: int = CHOSEN_LOOPS) -> float:
    """Share of the chains of ``hops`` answered at ``loops``; a dense model has no loops."""
    ask = record.settings["ask"]
    row = record.figures["grid"][ask["hops"].index(hops)]
    return row[ask["loops"].index(loops)] if len(row) > 1 else row[0]


def plot(summary: Summary, path: Path) -> None:
    """The looped model over hops and loops, and all arms over hops."""
    data = summary.data
    with panels(path, 2) as (grid, arms):
        lines(grid, data["loops"], dict(zip(data["hops"], data["grid"], strict=True)),
              label="{} hops", small=True)  # fmt: skip
        log2_ticks(grid, data["loops"])
        grid.set(title="Looped, facts in the prompt", xlabel="loops", ylabel="answered",
                 ylim=(0, 1.03))  # fmt: skip
        lines(arms, data["hops"], data["arms"])
        arms.axvspan(0.5, TRAINED_HOPS, color=COLOURS[0], alpha=0.07, lw=0)
        arms.set(title=f"All arms, looped at {CHOSEN_LOOPS} loops",
                 xlabel="hops (shaded: seen in training)", ylim=(0, 1.03))  # fmt: skip


def _mean(found: Sequence[Record], hops: int, loops: int = CHOSEN_LOOPS) -> float:
    return mean(answered(record, hops, loops) for record in found)


def _row(arm: str, found: Sequence[Record]) -> tuple[str, ...]:
    loss = mean(each(found, lambda record: record.figures["curve"][-1][1]))
    return (
        arm, str(len(found)), f"{found[0].figures['parameters']:,}", f"{loss:.3f}",
        *(share(found, partial(answered, hops=hops)) for hops in found[0].settings["ask"]["hops"]),
    )  # fmt: skip
