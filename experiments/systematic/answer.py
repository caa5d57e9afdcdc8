"""From accuracies by kind of chain to the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

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
from experiments.systematic.cells import (
    AHEAD,
    BETWEEN,
    CHOSEN_LOOPS,
    DENSE,
    DENSE_AT_MOST,
    HOPS,
    LEARNT,
    LONGER,
    LOOPED,
    SOLVED,
)
from experiments.systematic.measure import STAGES

_SHOWN = ((HOPS, "trained"), (HOPS, "known"), (HOPS, "lone-first"), (HOPS, "lone-last"),
          (HOPS, "lone"), (LONGER, "known"), (LONGER, "lone"))  # fmt: skip


def summarise(records: Sequence[Record]) -> Summary:
    """Chains of lone facts in the looped model against the best dense one; the three stages."""
    arms = by_arm(records)
    looped = arms[LOOPED]
    lone = {arm: mean(share(r, "lone") for r in found) for arm, found in arms.items()}
    dense, known = max(lone[arm] for arm in DENSE), mean(share(r, "known") for r in looped)
    if known < LEARNT:
        verdict = unclear("the looped model has not learnt the task; more steps would tell")
    elif lone[LOOPED] >= SOLVED and dense <= DENSE_AT_MOST:
        verdict = HOLDS
    else:
        verdict = HOLDS_IN_PART if lone[LOOPED] - dense >= AHEAD else DOES_NOT_HOLD
    steps = {kind: _reached(looped, kind) for kind in STAGES}
    return Summary(
        verdict,
        f"Of the two-hop chains of facts never composed in training, the looped model answers "
        f"{lone[LOOPED]:.1%} at {CHOSEN_LOOPS} loops, the best dense arm {dense:.1%}; with layers "
        f"of their own around the loop {lone[BETWEEN]:.1%}. Of held-out chains of known facts the "
        f"looped model answers {known:.1%}. It answers half of the trained chains from step "
        f"{steps['trained']}, of the held-out ones from step {steps['known']}, of those of lone "
        f"facts from step {steps['lone']}.",
        f"lone facts {lone[LOOPED]:.1%}, dense {dense:.1%}",
        ("arm", "seeds", "parameters", "training FLOPs",
         *(f"{hops} hops, {kind}" for hops, kind in _SHOWN)),
        [_row(arm, found) for arm, found in arms.items()],
        {"curves": {arm: {kind: _curve(arms[arm], kind) for kind in STAGES}
                    for arm in (LOOPED, "dense-equal-depth")},
         "loops": looped[0].settings["ask"]["loops"],
         "depths": {f"{hops} hops, {kind}": _by_loops(looped, hops, kind)
                    for hops, kind in _SHOWN[1:]},
         "dense": dense},
    )  # fmt: skip


def share(record: Record, kind: str, hops: int = HOPS) -> float:
    """Share answered, at the chosen depth where there is one."""
    row = record.figures["answered"][str(hops)][kind]
    return row[record.settings["ask"]["loops"].index(CHOSEN_LOOPS)] if len(row) > 1 else row[0]


def plot(summary: Summary, path: Path) -> None:
    """Three stages in the looped and in a dense model, and accuracy against loops."""
    data = summary.data
    with panels(path, 3) as axes:
        for ax, (arm, curves) in zip(axes, data["curves"].items(), strict=False):
            for (kind, (steps, shares)), colour in zip(curves.items(), COLOURS, strict=False):
                ax.plot(steps, shares, color=colour, label=kind)
            ax.set(title=f"Stages: {arm}", xlabel="step", ylabel="answered", ylim=(0, 1.03))
            ax.legend()
        for (name, shares), colour in zip(data["depths"].items(), COLOURS, strict=False):
            axes[2].plot(data["loops"], shares, "o-", color=colour, ms=4, label=name)
        axes[2].axhline(data["dense"], color="black", lw=0.8, ls=":", label="best dense, lone")
        axes[2].set_xscale("log", base=2)
        axes[2].set_xticks(data["loops"], [str(n) for n in data["loops"]])
        axes[2].set(title="Looped, against loops", xlabel="loops", ylim=(0, 1.03))
        axes[2].legend(fontsize=8)


def _row(arm: str, found: Sequence[Record]) -> tuple[str, ...]:
    figures = found[0].figures
    return (
        arm, str(len(found)), f"{figures['parameters']:,}", f"{figures['training_flops']:.1e}",
        *(_cell(found, hops, kind) for hops, kind in _SHOWN),
    )  # fmt: skip


def _cell(found: Sequence[Record], hops: int, kind: str) -> str:
    middle, spread = over_seeds(found, lambda record: share(record, kind, hops))
    return f"{middle:.1%}" + (f" ± {100 * spread:.1f}" if len(found) > 1 else "")


def _curve(found: Sequence[Record], kind: str) -> tuple[list[int], list[float]]:
    """Steps, and the mean over seeds of the share answered."""
    curves = [record.figures["curves"][f"eval/{kind}"] for record in found]
    steps = [step for step, _ in curves[0]]
    return steps, [
        mean(points) for points in zip(*([y for _, y in c] for c in curves), strict=True)
    ]


def _reached(found: Sequence[Record], kind: str) -> str:
    """The first measured step at which half is answered."""
    steps, shares = _curve(found, kind)
    return next((f"{n}" for n, y in zip(steps, shares, strict=True) if y >= 0.5), "(none)")


def _by_loops(found: Sequence[Record], hops: int, kind: str) -> list[float]:
    rows = [record.figures["answered"][str(hops)][kind] for record in found]
    return [mean(column) for column in zip(*rows, strict=True)]
