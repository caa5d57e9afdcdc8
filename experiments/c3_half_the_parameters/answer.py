"""From losses at every learning rate to the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from experiments.c3_half_the_parameters.cells import HALF, LOOPED, PART, UNROLLED, WHOLE
from experiments.claim import Record, Summary, verdict
from experiments.figure import COLOURS, panels
from experiments.spread import each, minus, over_seeds, shown

_ARMS = (HALF, LOOPED, WHOLE, UNROLLED)


def summarise(records: Sequence[Record]) -> Summary:
    """Each arm at its best learning rate, compared seed by seed."""
    arms = {arm: _best([r for r in records if r.settings["arm"] == arm]) for arm in _ARMS}
    gap = _difference(arms[HALF], arms[WHOLE])
    behind = _difference(arms[LOOPED], arms[WHOLE])
    measurable = gap[0] > gap[1]
    share = 1 - behind[0] / gap[0] if measurable else math.nan
    made_up = f"{share:.0%} of the gap made up" if measurable else "the gap is noise"
    flops = _flops(arms[LOOPED]) / _flops(arms[WHOLE])
    against_unrolled = _difference(arms[LOOPED], arms[UNROLLED])
    return Summary(
        verdict(
            behind[0] <= behind[1], share >= PART,
            unclear="" if measurable else "twice the layers gain no more than the spread over "
            "seeds; longer training would tell",
        ),
        f"The looped model's loss is {behind[0]:+.4f} ± {behind[1]:.4f} nats per byte from that of "
        f"the dense model with twice the parameters, at {flops:.1f} times its FLOPs. Half the "
        f"parameters without loops are {gap[0]:+.4f} ± {gap[1]:.4f} from it: {made_up}. A dense "
        f"model of the looped one's FLOPs is {-against_unrolled[0]:+.4f} ± "
        f"{against_unrolled[1]:.4f} from the looped one.",
        f"{behind[0]:+.4f} ± {behind[1]:.4f} nats from 2x the parameters; {made_up}",
        ("model", "parameters", "training FLOPs", "best lr", "loss (nats per byte)",
         "above dense-12"),
        [_row(arm, arms) for arm in _ARMS],
        {arm: {"flops": _flops(found), "parameters": found[0].figures["parameters"],
               "losses": each(found, "loss"),
               "curve": found[0].figures["curve"]}
         for arm, found in arms.items()},
    )  # fmt: skip


def plot(summary: Summary, path: Path) -> None:
    """Loss against parameters and against FLOPs, every seed a point."""
    with panels(path, 2) as axes:
        for ax, name in zip(axes, ("parameters", "flops"), strict=True):
            for (arm, drawn), colour in zip(summary.data.items(), COLOURS, strict=False):
                losses = drawn["losses"]
                ax.plot([drawn[name]] * len(losses), losses, "o", color=colour, alpha=0.6)
                ax.plot(drawn[name], mean(losses), "_", ms=24, mew=2, color=colour, label=arm)
            ax.set(xlabel=name, ylabel="nats per byte", title=f"Validation loss against {name}")
        axes[1].set(xscale="log", xlabel="training FLOPs", title="The same against compute")
        axes[0].legend()


def _best(records: Sequence[Record]) -> list[Record]:
    """The records of the learning rate with the lowest mean loss, by seed."""
    rates = sorted({record.settings["lr"] for record in records})
    found = [[r for r in records if r.settings["lr"] == rate] for rate in rates]
    best = min(found, key=lambda runs: over_seeds(runs, "loss")[0])
    return sorted(best, key=lambda record: record.seed)


def _difference(ours: Sequence[Record], theirs: Sequence[Record]) -> tuple[float, float]:
    return minus(each(ours, "loss"), each(theirs, "loss"))


def _flops(found: Sequence[Record]) -> float:
    return float(found[0].figures["training_flops"])


def _row(arm: str, arms: dict[str, list[Record]]) -> tuple[str, ...]:
    found = arms[arm]
    above = "-" if arm == WHOLE else shown(_difference(found, arms[WHOLE]))
    return (
        arm, f"{found[0].figures['parameters']:,}", f"{_flops(found):.2e}",
        f"{found[0].settings['lr']:g}", shown(over_seeds(found, "loss")),
        above,
    )  # fmt: skip
