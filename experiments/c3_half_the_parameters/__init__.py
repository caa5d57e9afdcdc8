"""C3: does a looped model match a dense one with twice its layers?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.claim import QUICK, Cell, Claim, Place, Record, Summary, sweep, verdict
from experiments.figure import COLOURS, panels
from experiments.spread import each, minus, over_seeds, shown
from experiments.text import Sizes, train

LOOPS = 8
ONCE, RECURRENT = 2, 4
LOOPED = "looped"
WHOLE, HALF, UNROLLED = "dense-12", "dense-6", "dense-34"
LAYERS = {HALF: ONCE + RECURRENT, WHOLE: 2 * (ONCE + RECURRENT), UNROLLED: ONCE + RECURRENT * LOOPS}
"""Dense arm -> blocks: those the looped model stores, twice that, and those it executes."""
PHI = 0.46
EQUIVALENT = ONCE + LOOPS**PHI * RECURRENT
PART = 0.5

CLAIM = Claim.read(__file__, vars())
_SIZES = Sizes(
    train={"steps": 700, "seq_len": 32, "warmup_steps": 70},
    widths={"cpu": (32, 4), "gpu": (256, 4), QUICK: (32, 4)},
    val_windows=512, gpu_seq_len=256, quick_steps=2,
)  # fmt: skip
_RATES = {"cpu": (5e-3, 1e-2), "gpu": (1e-3, 2e-3), QUICK: (5e-3,)}


def cells(scale: str) -> list[Cell]:
    """Return three seeds of every arm and learning rate, the most expensive first."""
    quick = scale == QUICK
    arms = (LOOPED, HALF) if quick else (LOOPED, UNROLLED, WHOLE, HALF)
    grid = [(arm, lr) for arm in arms for lr in _RATES[scale]]
    found = {f"{arm}-lr{lr:g}": _settings(arm, lr, scale) for arm, lr in grid}
    return sweep(found, [0] if quick else range(3))


def _settings(arm: str, lr: float, scale: str) -> dict[str, Any]:
    looped = arm == LOOPED
    settings = _SIZES.settings(
        scale, lr=lr, depth={"plan": "fixed", "mean": LOOPS},
        model={"max_loop_iters": LOOPS, "prelude_layers": 1, "recurrent_layers": RECURRENT,
               "coda_layers": 1},
        architecture="looped" if looped else "dense",
    )  # fmt: skip
    return {"arm": arm, "lr": lr, **settings} | ({} if looped else {"n_layers": LAYERS[arm]})


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Train one model and measure its validation loss."""
    trained = train(cell, place)
    return trained.costs() | {"loss": trained.losses([LOOPS])[0]}


_ARMS = (HALF, LOOPED, WHOLE, UNROLLED)


def summarise(records: Sequence[Record]) -> Summary:
    """Compare the arms, each at its best learning rate, seed by seed."""
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
    """Plot the loss of every seed against parameters and against FLOPs."""
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
    """Return the records of the learning rate with the lowest mean loss, sorted by seed."""
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
