"""From accuracies by kind of chain to the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean

from experiments.claim import Record, Summary, verdict
from experiments.figure import lines, log2_ticks, panels
from experiments.spread import by_arm, columns, share
from experiments.systematic.cells import (
    AHEAD_POINTS,
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
    lone = {arm: mean(answered(r, "lone") for r in found) for arm, found in arms.items()}
    dense, known = max(lone[arm] for arm in DENSE), mean(answered(r, "known") for r in looped)
    steps = {kind: _reached(looped, kind) for kind in STAGES}
    return Summary(
        verdict(
            lone[LOOPED] >= SOLVED and dense <= DENSE_AT_MOST,
            100 * (lone[LOOPED] - dense) >= AHEAD_POINTS,
            unclear="" if known >= LEARNT
            else "the looped model has not learnt the task; more steps would tell",
        ),
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


def answered(record: Record, kind: str, hops: int = HOPS) -> float:
    """Share answered, at the chosen depth where there is one."""
    row = record.figures["answered"][str(hops)][kind]
    return row[record.settings["ask"]["loops"].index(CHOSEN_LOOPS)] if len(row) > 1 else row[0]


def plot(summary: Summary, path: Path) -> None:
    """Three stages in the looped and in a dense model, and accuracy against loops."""
    data = summary.data
    with panels(path, 3) as axes:
        for ax, (arm, curves) in zip(axes, data["curves"].items(), strict=False):
            steps, *_ = (points[0] for points in curves.values())
            lines(ax, steps, {kind: points[1] for kind, points in curves.items()}, "-")
            ax.set(title=f"Stages: {arm}", xlabel="step", ylabel="answered", ylim=(0, 1.03))
        axes[2].axhline(data["dense"], color="black", lw=0.8, ls=":", label="best dense, lone")
        lines(axes[2], data["loops"], data["depths"], small=True)
        log2_ticks(axes[2], data["loops"])
        axes[2].set(title="Looped, against loops", xlabel="loops", ylim=(0, 1.03))


def _row(arm: str, found: Sequence[Record]) -> tuple[str, ...]:
    figures = found[0].figures
    return (
        arm, str(len(found)), f"{figures['parameters']:,}", f"{figures['training_flops']:.1e}",
        *(share(found, partial(answered, kind=kind, hops=hops)) for hops, kind in _SHOWN),
    )  # fmt: skip


def _curve(found: Sequence[Record], kind: str) -> tuple[list[int], list[float]]:
    """Return steps, and the mean over seeds of the share answered."""
    curves = [record.figures["curves"][f"eval/{kind}"] for record in found]
    steps = [step for step, _ in curves[0]]
    return steps, columns([y for _, y in curve] for curve in curves)


def _reached(found: Sequence[Record], kind: str) -> str:
    """The first measured step at which half is answered."""
    steps, shares = _curve(found, kind)
    return next((f"{n}" for n, y in zip(steps, shares, strict=True) if y >= 0.5), "(none)")


def _by_loops(found: Sequence[Record], hops: int, kind: str) -> list[float]:
    return columns(record.figures["answered"][str(hops)][kind] for record in found)
