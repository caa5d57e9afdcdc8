"""From trainings that ended or not to the verdict."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from experiments.c2_stability.cells import ARMS, CONSTRAINED, RATIO, UNCONSTRAINED
from experiments.claim import Record, Summary, verdict
from experiments.figure import COLOURS, panels
from experiments.spread import mean_std

Grid = dict[str, dict[float, list[Record]]]
"""Arm -> learning rate -> its records, one a seed."""
_SHOWN_LOOPS = "16"


def summarise(records: Sequence[Record]) -> Summary:
    """Largest stable learning rate of every arm, and the verdict on their ratio."""
    grid = _grid(records)
    stable = {arm: largest_stable(rates) for arm, rates in grid.items()}
    rates = sorted(grid[CONSTRAINED])
    ratios = [_ratio(stable[CONSTRAINED], stable[arm]) for arm in UNCONSTRAINED]
    reasons = Counter(r.figures["diverged"] for r in records if r.figures["diverged"])
    diverged = reasons.total()
    shown = {arm: f"{rate:g}" if rate else "none" for arm, rate in stable.items()}
    beyond = " (nowhere in the sweep)" if stable[CONSTRAINED] == rates[-1] else ""
    return Summary(
        verdict(
            min(ratios) >= RATIO, max(ratios) > 1,
            unclear="" if diverged
            else "nothing diverged; higher learning rates or longer runs would tell",
        ),
        f"The constrained injection is stable up to {shown[CONSTRAINED]}{beyond}, concatenation "
        f"up to {shown['concat']}, addition up to {shown['additive']}: a factor of {ratios[0]:g} "
        f"and {ratios[1]:g}. Sandwich norms bring concatenation to {shown['concat-sandwich']}; "
        f"without the prelude's norm the constrained one reaches {shown['lti-no-prelude-norm']}; "
        f"Euler's rule {shown['lti-euler']}, the predecessor's rule {shown['predecessor']}. "
        f"{diverged} of {len(records)} runs diverged: {_told(reasons)}.",
        f"stable to {shown[CONSTRAINED]}; concat {shown['concat']}, additive {shown['additive']}",
        ("arm", "parameters", *(f"lr {rate:g}" for rate in rates), "largest stable", "rho",
         "largest growth"),
        [_row(arm, grid[arm], shown[arm]) for arm in ARMS],
        {"rates": rates, "stable": stable,
         "loss": {arm: [_mean_loss(grid[arm][rate]) for rate in rates] for arm in ARMS},
         "growth": {arm: [_growth(grid[arm][rate]) for rate in rates] for arm in ARMS}},
    )  # fmt: skip


def largest_stable(rates: dict[float, list[Record]]) -> float:
    """The highest learning rate up to which no seed diverges; 0 if there is none."""
    largest = 0.0
    for rate, found in sorted(rates.items()):
        if any(record.figures["diverged"] for record in found):
            break
        largest = rate
    return largest


def _told(reasons: Counter[str]) -> str:
    words = {"state": "by the growth of the state", "loss": "by the loss",
             "not finite": "by numbers that are not finite"}  # fmt: skip
    return ", ".join(f"{n} {words[reason]}" for reason, n in reasons.items()) or "none"


def _ratio(ours: float, theirs: float) -> float:
    """Of two largest stable rates; 0 where ours is not stable at any."""
    return ours / theirs if theirs else math.inf if ours else 0.0


def plot(summary: Summary, path: Path) -> None:
    """Loss and growth of the state against the learning rate; a line ends where runs diverge."""
    data = summary.data
    with panels(path, 2) as (loss, growth):
        for arm, colour in zip(data["loss"], COLOURS, strict=False):
            style = "s--" if arm in UNCONSTRAINED else "o-"
            for ax, name in ((loss, "loss"), (growth, "growth")):
                ax.plot(data["rates"], data[name][arm], style, color=colour, ms=4, label=arm)
        for ax in (loss, growth):
            ax.set(xscale="log", xlabel="learning rate")
            ax.set_xticks(data["rates"], [f"{rate:g}" for rate in data["rates"]])
            ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        loss.set(title=f"Validation loss at {_SHOWN_LOOPS} loops", ylabel="nats per byte")
        loss.legend(fontsize=8)
        growth.axhline(1e3, color="black", lw=0.8, ls=":")
        growth.set(title="Growth of the state", ylabel="largest ||h_T|| / ||h_0||", yscale="log")


def _grid(records: Sequence[Record]) -> Grid:
    grid: Grid = {}
    for record in records:
        of_arm = grid.setdefault(record.settings["arm"], {})
        of_arm.setdefault(record.settings["lr"], []).append(record)
    return grid


def _row(arm: str, rates: dict[float, list[Record]], stable: str) -> tuple[str, ...]:
    found = [record for _, each in sorted(rates.items()) for record in each]
    rho = max((r.figures["rho"] for r in found if r.figures["rho"] is not None), default=None)
    return (
        arm, f"{found[0].figures['parameters']:,}",
        *(_cell(each) for _, each in sorted(rates.items())), stable,
        "-" if rho is None else f"{rho:.2f}",
        f"{max(_growth([record]) for record in found):.0f}",
    )  # fmt: skip


def _cell(found: Sequence[Record]) -> str:
    diverged = sum(bool(record.figures["diverged"]) for record in found)
    if diverged:
        return f"{diverged} of {len(found)} diverged"
    middle, spread = mean_std([record.figures["loss"][_SHOWN_LOOPS] for record in found])
    return f"{middle:.3f} ± {spread:.3f}"


def _mean_loss(found: Sequence[Record]) -> float:
    """NaN, which is not drawn, where a seed diverged."""
    if any(record.figures["diverged"] for record in found):
        return float("nan")
    return mean(record.figures["loss"][_SHOWN_LOOPS] for record in found)


def _growth(found: Sequence[Record]) -> float:
    """The largest of any seed; infinite where it was not finite."""
    growths = [record.figures["largest_growth"] for record in found]
    return float("inf") if None in growths else max(growths)
