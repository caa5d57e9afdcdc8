"""C3: does a looped model match a dense one with twice its layers? What is a loop worth?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.claim import QUICK, Cell, Claim, Place, Record, Summary, arms_by_seed, verdict
from experiments.figure import COLOURS, MUTED, panels
from experiments.phi import Estimate, Runs, phi
from experiments.spread import by_arm, each, over_seeds, paired, shown
from experiments.text import PACKAGES_VOCABULARY, Sizes, train

LOOPS, FEW = 4, 2
STORED, AROUND = 2, 2
"""Blocks in the loop, and around it in the arm that has such."""
DOUBLE_BLOCKS = 2 * STORED
PHI, LANES_PHI = 0.46, 0.65
EQUIVALENT = LOOPS**PHI * STORED
PART = 0.5
STEPS = 1720
SWEPT_STEPS = STEPS // 4
SEEDS = 2
RATES = (2.5e-3, 5e-3, 1e-2, 2e-2)
LOOPED_RATE, DENSE_RATE = 5e-3, 5e-3
"""The best of the sweep."""
LOOPED, FEW_LOOPS, BETWEEN = "looped", f"looped-{FEW}-loops", "looped-between-blocks"
HALF, WHOLE, UNROLLED = "one-loop-2", "one-loop-4", "one-loop-8"
LAYERS = {HALF: STORED, WHOLE: DOUBLE_BLOCKS, UNROLLED: STORED * LOOPS}
"""Arm without loops -> blocks."""
DENSE = {f"dense-{blocks}": blocks for blocks in LAYERS.values()}
"""The same without what surrounds the blocks of a looped model, arm -> blocks."""
LAW = (*LAYERS, FEW_LOOPS, LOOPED, BETWEEN)
"""Arms to which phi is fitted."""
SHOWN = (*LAW, *DENSE)

CLAIM = Claim.read(__file__, vars())
_SIZES = Sizes(
    train={"steps": STEPS, "seq_len": 128, "warmup_steps": STEPS // 10, "global_batch": 16,
           "dtype": "bfloat16"},
    widths={"cpu": (320, 5), "gpu": (768, 12), QUICK: (32, 4)},
    val_windows=1024, gpu_seq_len=512, quick_steps=2,
)  # fmt: skip
_ARMS: dict[str, dict[str, Any]] = {
    LOOPED: {"loops": LOOPS, "seeds": SEEDS},
    FEW_LOOPS: {"loops": FEW, "seeds": SEEDS},
    HALF: {"blocks": LAYERS[HALF], "seeds": SEEDS + 1},
    WHOLE: {"blocks": LAYERS[WHOLE], "seeds": SEEDS + 1},
    UNROLLED: {"blocks": LAYERS[UNROLLED]},
    BETWEEN: {"loops": LOOPS, "around": AROUND},
} | {arm: {"n_layers": blocks} for arm, blocks in DENSE.items()}
_SWEPT = {"sweep-looped": {"loops": LOOPS}, "sweep-dense": {"n_layers": STORED}}


def cells(scale: str) -> list[Cell]:
    """Return the sweep of learning rates, then every arm, one seed after the other."""
    if scale == QUICK:
        arms = {arm: _ARMS[arm] | {"seeds": 1} for arm in (HALF, BETWEEN, "dense-2")}
    else:
        arms = {
            f"{arm}-lr{lr:g}": about | {"lr": lr, "steps": SWEPT_STEPS}
            for arm, about in _SWEPT.items()
            for lr in RATES
        } | _ARMS
    return arms_by_seed(arms, lambda **about: _settings(scale, **about))


def _settings(
    scale: str,
    *,
    loops: int = 1,
    around: int = 0,
    blocks: int = STORED,
    n_layers: int | None = None,
    lr: float | None = None,
    steps: int | None = None,
) -> dict[str, Any]:
    dense = n_layers is not None
    settings = _SIZES.settings(
        scale, lr=lr or (DENSE_RATE if dense else LOOPED_RATE),
        depth={"plan": "mixed" if loops > 1 or dense else "fixed", "mean": loops},
        architecture="dense" if dense else "looped",
        model={"max_loop_iters": loops, "prelude_layers": around // 2,
               "recurrent_layers": blocks, "coda_layers": around // 2},
    )  # fmt: skip
    run = settings["run"]
    run["optim"]["name"] = "muon"
    if scale != QUICK:
        run["model"]["vocab_size"] = PACKAGES_VOCABULARY
        settings |= {"text": "packages", "save_every": 200}
    if steps is not None:
        run["train"] |= {"steps": steps, "warmup_steps": steps // 10}
    return settings | {"loops": loops, "around": around} | ({"n_layers": n_layers} if dense else {})


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Train one model and measure its bits per byte at 1 to twice the trained loops."""
    trained = train(cell, place)
    loops = cell.settings["loops"]
    bits = trained.bits_per_byte(list(range(1, 2 * loops + 1)) if loops > 1 else [1])
    return trained.costs() | {"bits": bits}


def bits(record: Record) -> float:
    """Return the bits per byte at the trained number of loops."""
    return float(record.figures["bits"][record.settings["loops"] - 1])


def summarise(records: Sequence[Record]) -> Summary:
    """Compare the arms seed by seed, and fit phi."""
    arms = by_arm(records)
    swept = {arm: found for arm, found in arms.items() if arm not in _ARMS}
    arms = {arm: arms[arm] for arm in SHOWN}
    gap = paired(arms[HALF], arms[WHOLE], bits)
    behind = paired(arms[LOOPED], arms[WHOLE], bits)
    measurable = gap[0] > gap[1]
    share = 1 - behind[0] / gap[0] if measurable else math.nan
    made_up = f"{share:.0%} of the gap made up" if measurable else "the gap is noise"
    flops = _flops(arms[LOOPED]) / _flops(arms[WHOLE])
    unrolled = paired(arms[UNROLLED], arms[LOOPED], bits)
    named = ", ".join(
        f"{arm} {paired(arms[arm], arms[other], bits)[0]:+.3f}"
        for arm, other in zip(DENSE, LAYERS, strict=True)
    )
    worth = {name: phi(_law(arms, looped)) for name, looped in _ESTIMATES.items()}
    fitted = worth["all looped arms"]
    runs = sum(len(arms[arm]) for arm in LAW)
    apart = ", ".join(f"{value} from {name}" for name, value in list(worth.items())[1:])
    return Summary(
        verdict(
            behind[0] <= behind[1], share >= PART,
            unclear="" if measurable else "twice the layers gain no more than the spread over "
            "seeds; longer training would tell",
        ),
        f"At {LOOPS} loops the looped model is {_signed(behind)} bits per byte "
        f"above twice the blocks without loops, at {flops:.1f} times the FLOPs. The same blocks "
        f"without loops are {_signed(gap)} from these: {made_up}. As many blocks as "
        f"the looped model executes are {_signed(unrolled)} from it. phi is "
        f"{fitted} over {runs} runs ({apart}): {_against(fitted, PHI)} {PHI}, "
        f"{_against(fitted, LANES_PHI)} {LANES_PHI}. Plain transformers are above the "
        f"models without loops of as many blocks by {named}: from that of {DOUBLE_BLOCKS} blocks "
        f"the looped model is {paired(arms[LOOPED], arms['dense-4'], bits)[0]:+.3f}.",
        f"{_signed(behind)} bits from 2x the parameters; {made_up}; phi {fitted}",
        ("model", "seeds", "parameters", "training FLOPs", "bits per byte",
         f"above {WHOLE}"),
        [_row(arm, found, arms[WHOLE]) for arm, found in (arms | swept).items()],
        {"arms": {arm: {"flops": _flops(found), "parameters": found[0].figures["parameters"],
                        "bits": each(found, bits)} for arm, found in arms.items()},
         "loops": {arm: [record.figures["bits"] for record in arms[arm]]
                   for arm in (FEW_LOOPS, LOOPED, BETWEEN)}},
    )  # fmt: skip


_ESTIMATES = {
    "all looped arms": (FEW_LOOPS, LOOPED, BETWEEN),
    f"{FEW} loops": (FEW_LOOPS,),
    f"{LOOPS} loops": (LOOPED,),
    f"{LOOPS} loops between blocks": (BETWEEN,),
}
"""Name -> looped arms that phi is fitted to."""


def _law(arms: dict[str, list[Record]], looped: Sequence[str]) -> list[Runs]:
    """Return the runs without loops, and those of ``looped``."""
    total = {arm: found[0].figures["parameters"] for arm, found in arms.items()}
    recurrent = STORED * (total[WHOLE] - total[HALF]) / (LAYERS[WHOLE] - LAYERS[HALF])
    return [
        Runs(each(arms[arm], bits), recurrent, total[arm] - recurrent,
             arms[arm][0].settings["loops"])
        for arm in LAW if arm in LAYERS or arm in looped
    ]  # fmt: skip


def _against(fitted: Estimate, value: float) -> str:
    if math.isnan(fitted.value):
        return "not comparable with"
    return "above" if fitted.low > value else "below" if fitted.high < value else "consistent with"


def plot(summary: Summary, path: Path) -> None:
    """Plot bits per byte against parameters, FLOPs and loops."""
    data = summary.data
    with panels(path, 3) as (*axes, loops):
        for ax, name in zip(axes, ("parameters", "flops"), strict=True):
            for (arm, drawn), colour in zip(data["arms"].items(), COLOURS * 2, strict=False):
                marker = "o" if arm in LAYERS else "s" if arm in DENSE else "^"
                ax.plot([drawn[name]] * len(drawn["bits"]), drawn["bits"], marker, color=colour,
                        alpha=0.6, label=arm)  # fmt: skip
            alone = [data["arms"][arm] for arm in LAYERS]
            ax.plot([d[name] for d in alone], [mean(d["bits"]) for d in alone], color=MUTED, lw=1)
            ax.set(xscale="log", xlabel=name, ylabel="bits per byte", title=f"Against {name}")
        axes[1].set(xlabel="training FLOPs", title="Against compute")
        axes[0].legend(fontsize=7)
        for (arm, seeds), colour in zip(data["loops"].items(), COLOURS[3:], strict=False):
            middle = [mean(column) for column in zip(*seeds, strict=True)]
            loops.plot(range(1, len(middle) + 1), middle, "^-", color=colour, label=arm)
        loops.set(xlabel="loops", ylabel="bits per byte", title="Against loops")
        loops.legend(fontsize=7)


def _signed(value: tuple[float, float]) -> str:
    return ("+" if value[0] >= 0 else "") + shown(value)


def _flops(found: Sequence[Record]) -> float:
    return float(found[0].figures["training_flops"])


def _row(arm: str, found: Sequence[Record], whole: Sequence[Record]) -> tuple[str, ...]:
    swept = arm not in _ARMS
    return (
        arm, f"{len(found)}", f"{found[0].figures['parameters']:,}", f"{_flops(found):.2e}",
        shown(over_seeds(found, bits)),
        "-" if swept else shown(paired(found, whole, bits)),
    )  # fmt: skip
