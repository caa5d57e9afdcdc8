"""Text: what makes loops pay on text, one change at a time?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from experiments.claim import QUICK, Cell, Claim, Place, Record, Summary, sweep, verdict
from experiments.figure import COLOURS, MUTED, lines, log2_ticks, panels
from experiments.phi import Estimate, Runs, phi
from experiments.spread import (
    at_depth,
    by_arm,
    columns,
    each,
    mean_std,
    minus,
    over_seeds,
    paired,
    shown,
)
from experiments.text import Sizes, train
from experiments.text_recipe.variants import changed

LOOPS, DOUBLE = 4, 8
BLOCKS = 2
STEPS = 800
EVALUATED = (1, 2, 3, LOOPS, 6, DOUBLE, 16)
AHEAD, BEYOND = 0.03, 0.02
RECIPE, DENSE, ONE_LOOP = "mixed", "dense", "one-loop"
RATES = {
    (RECIPE, 1): (4e-2, 1e-2, 2e-2, 8e-2), (RECIPE, 2): (1e-2, 2e-2, 4e-2),
    (DENSE, 1): (1e-2, 5e-3, 2e-2), (DENSE, 2): (1e-2, 5e-3, 2e-2),
    (ONE_LOOP, 1): (2e-2, 1e-2, 4e-2),
}  # fmt: skip
"""(arm, width in units of the smaller one) -> learning rates; the first is the best of seed 0."""
SEEDS = 3
RATE = {1: 4e-2, 2: 1e-2}
"""Width -> learning rate of the recipe, and of every change of it."""
DENSE_RATE = 1e-2
BITS = 1.4426950408889634
"""Bits of one nat."""

CLAIM = Claim.read(__file__, vars())
_SIZES = Sizes(
    train={"steps": STEPS, "seq_len": 128, "warmup_steps": STEPS // 10, "global_batch": 16},
    widths={"cpu": (64, 4), "gpu": (512, 8), QUICK: (32, 4)},
    val_windows=512, gpu_seq_len=512, quick_steps=3,
)  # fmt: skip
_MIXED = {"plan": "mixed", "mean": LOOPS}
_ONCE: dict[str, Any] = {"loops": 1, "depth": {"plan": "fixed", "mean": 1}}
_CHANGES: dict[str, dict[str, Any]] = {
    "fixed": {"depth": {"plan": "fixed", "mean": LOOPS}},
    "poisson": {"depth": {"plan": "poisson", "mean": LOOPS}},
    "every-loop": {"depth": {"plan": "uniform", "low": 1, "high": LOOPS}},
    "grown": {"depth": _MIXED | {"curriculum_steps": STEPS // 2}},
    "adamw": {"optimizer": "adamw", "lr": 1e-2},
    "gains": {"change": "gains"},
    "orthogonal": {"change": "orthogonal"},
    "selective": {"change": "selective"},
    "2-lanes": {"change": "2 lanes"},
    "4-lanes": {"change": "4 lanes"},
    "4-lanes-lr0.02": {"change": "4 lanes", "lr": 2e-2},
    "8-loops": {"loops": DOUBLE, "depth": _MIXED | {"mean": DOUBLE}},
    "8-loops-gains": {"change": "gains", "loops": DOUBLE, "depth": _MIXED | {"mean": DOUBLE}},
    "2-loops": {"loops": 2, "depth": _MIXED | {"mean": 2}},
    "dense-2x-blocks": {"architecture": "dense", "lr": DENSE_RATE, "n_layers": BLOCKS * 2},
    "dense-4x-blocks": {"architecture": "dense", "lr": DENSE_RATE, "n_layers": BLOCKS * LOOPS},
    "dense-4x-steps": {"architecture": "dense", "lr": DENSE_RATE, "steps": LOOPS},
    "dense-adamw": {"architecture": "dense", "optimizer": "adamw", "lr": 1e-2},
}
"""Arm -> what differs from the recipe."""
WIDE = (
    "fixed", "poisson", "every-loop", "grown", "gains", "orthogonal", "selective", "2-lanes",
    "4-lanes", "8-loops", "8-loops-gains",
)  # fmt: skip
"""Changes of the loop, measured at width 128 too."""


def cells(scale: str) -> list[Cell]:
    """Return every arm with its seeds, those of the verdict first; rates are swept on seed 0."""
    if scale == QUICK:
        return sweep({"gains": _settings(scale, "gains", change="gains")}, [0])
    found: list[Cell] = []
    for (arm, width), rates in RATES.items():
        architecture = "dense" if arm == DENSE else "looped"
        for lr in rates:
            about = _ONCE if arm == ONE_LOOP else {}
            settings = _settings(scale, arm, width=width, lr=lr, architecture=architecture, **about)
            seeds = range(SEEDS if lr == rates[0] else 1)
            found += sweep({_name(arm, width, lr): settings}, seeds)
    for width, arms in ((1, tuple(_CHANGES)), (2, WIDE)):
        for arm in arms:
            changes = {"width": width, "lr": RATE[width]} | _CHANGES[arm]
            found += sweep({_changed(arm, width): _settings(scale, arm, **changes)}, range(SEEDS))
    return found


def _changed(arm: str, width: int) -> str:
    return f"{arm}{'-wide' if width > 1 else ''}"


def _name(arm: str, width: int, lr: float) -> str:
    return f"{_changed(arm, width)}-lr{lr:g}"


def _settings(
    scale: str,
    arm: str,
    *,
    width: int = 1,
    lr: float = RATE[1],
    loops: int = LOOPS,
    depth: dict[str, Any] = _MIXED,
    architecture: str = "looped",
    optimizer: str = "muon",
    steps: int = 1,
    change: str = "",
    n_layers: int | None = None,
) -> dict[str, Any]:
    dim = width * _SIZES.widths[scale][0]
    settings = _SIZES.settings(
        scale, lr=lr, depth=depth, architecture=architecture,
        model={"dim": dim, "ffn_dim": 2 * dim, "max_loop_iters": loops, "prelude_layers": 0,
               "recurrent_layers": BLOCKS, "coda_layers": 0},
    )  # fmt: skip
    settings["run"]["optim"]["name"] = optimizer
    settings["run"]["train"]["steps"] *= steps
    return (
        settings
        | {"arm": arm, "width": width, "lr": lr, "change": change}
        | ({} if n_layers is None else {"n_layers": n_layers})
    )


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Train one model and measure bits per byte at every depth; a dense model has one."""
    trained = train(cell, place, changed(cell.settings["change"]))
    looped = trained.run.architecture == "looped"
    losses = trained.losses(list(EVALUATED) if looped else [1])
    return trained.costs() | {"bits": [BITS * loss for loss in losses]}


def at(loops: int = LOOPS) -> Any:
    """Return the metric of the bits at ``loops``; a dense model has one."""

    def bits(record: Record) -> float:
        return at_depth(record.figures["bits"], EVALUATED, loops)

    return bits


def trained_depth(record: Record) -> int:
    """Return the number of loops that the arm is trained at."""
    return int(record.settings["run"]["model"]["max_loop_iters"])


def _at_trained_depth(record: Record) -> float:
    return float(at(trained_depth(record))(record))


def _bits(records: Sequence[Record]) -> list[float]:
    return each(records, _at_trained_depth)


def _best(arms: dict[str, list[Record]], arm: str, width: int) -> list[Record]:
    """Return the records of an arm at its best learning rate."""
    return arms[_name(arm, width, RATES[arm, width][0])]


def _from(ours: Sequence[Record], theirs: Sequence[Record]) -> tuple[float, float]:
    return paired(ours, theirs, _at_trained_depth)


def summarise(records: Sequence[Record]) -> Summary:
    """Compare the recipe with dense models at both widths, and every change with the recipe."""
    arms = by_arm(records)
    sides = {w: (_best(arms, RECIPE, w), _best(arms, DENSE, w)) for w in (1, 2)}
    gains = {w: minus(_bits(dense), _bits(ours)) for w, (ours, dense) in sides.items()}
    shares = {w: gains[w][0] / mean_std(_bits(dense))[0] for w, (_, dense) in sides.items()}
    falls = all(_falls(ours) for ours, _ in sides.values())
    beyond = {
        w: over_seeds(ours, at(DOUBLE))[0] / over_seeds(ours, at())[0] - 1
        for w, (ours, _) in sides.items()
    }
    once = minus(_bits(_best(arms, ONE_LOOP, 1)), _bits(sides[1][0]))
    better, worse = zip(*(_beyond_noise(arms, w, sides[w][0]) for w in sides), strict=True)
    flops = {arm: _from(arms[arm], sides[1][0]) for arm in _FLOPS}
    worth = {loops: _phi(arms, sides[1], loops) for loops in (2, LOOPS)}
    return Summary(
        verdict(
            min(shares.values()) >= AHEAD and falls and max(beyond.values()) <= BEYOND,
            all(gain[0] > gain[1] for gain in gains.values()),
        ),
        f"At equal parameters and data the recipe needs {shares[1]:.1%} fewer bits per byte at "
        f"width 64 ({shown(gains[1])}) and {shares[2]:.1%} fewer at width 128 "
        f"({shown(gains[2])}). Trained and run at one loop, the model of width 64 needs "
        f"{shown(once)} more: that is the gain from looping. "
        f"{'Every' if falls else 'Not every'} loop up to {LOOPS} lowers its loss; {DOUBLE} loops "
        f"cost {beyond[1]:+.1%} and {beyond[2]:+.1%}. At equal training FLOPs a dense model of "
        f"{LOOPS} times the blocks is {shown(flops[_FLOPS[0]])} from it, one trained for {LOOPS} "
        f"times the steps {shown(flops[_FLOPS[1]])}. By the dense models of 2, 4 and 8 blocks "
        f"{LOOPS} loops have phi {worth[LOOPS]}, 2 loops {worth[2]}. Changes that lower its loss "
        f"by more than one deviation: {better[0]} at width 64, {better[1]} at width 128; that "
        f"raise it: {worse[0]} at width 64, {worse[1]} at width 128.",
        f"-{shares[1]:.1%} and -{shares[2]:.1%} bits at equal parameters; equal FLOPs "
        f"{flops[_FLOPS[1]][0]:+.3f}",
        ("arm", "seeds", "parameters", "training FLOPs", "time",
         *(f"{n} loops" for n in EVALUATED), "from the recipe"),
        [_row(name, found, sides[found[0].settings["width"]][0]) for name, found in arms.items()],
        {"loops": list(EVALUATED),
         "curves": {"width 64": columns(r.figures["bits"] for r in sides[1][0]),
                    "width 128": columns(r.figures["bits"] for r in sides[2][0])},
         "dense": {"width 64": mean_std(_bits(sides[1][1]))[0],
                   "width 128": mean_std(_bits(sides[2][1]))[0]},
         "changes": {"width 64": {name: _from(arms[name], sides[1][0]) for name in _CHANGES},
                     "width 128": {name: _from(arms[_changed(name, 2)], sides[2][0])
                                   for name in WIDE}}},
    )  # fmt: skip


_FLOPS = ("dense-4x-blocks", "dense-4x-steps")


def _phi(
    arms: dict[str, list[Record]], sides: tuple[list[Record], list[Record]], n_loops: int
) -> Estimate:
    recipe, dense = sides
    rising = [dense, arms["dense-2x-blocks"], arms["dense-4x-blocks"]]
    looped = recipe if n_loops == LOOPS else arms["2-loops"]
    points = [Runs(_bits(found), found[0].figures["parameters"]) for found in rising]
    return phi([*points, Runs(_bits(looped), looped[0].figures["parameters"], loops=n_loops)])


def _falls(records: Sequence[Record]) -> bool:
    middle = columns(record.figures["bits"] for record in records)[: EVALUATED.index(LOOPS) + 1]
    return all(later < earlier for earlier, later in pairwise(middle))


def _beyond_noise(
    arms: dict[str, list[Record]], width: int, recipe: Sequence[Record]
) -> tuple[str, str]:
    """Name the looped arms that are better, and worse, than the recipe by over one deviation."""
    better, worse = list[str](), list[str]()
    for name in _CHANGES if width == 1 else WIDE:
        if not name.startswith("dense"):
            middle, spread = _from(arms[_changed(name, width)], recipe)
            if abs(middle) > spread:
                (better if middle < 0 else worse).append(f"{name} ({middle:+.4f})")
    return ", ".join(better) or "none", ", ".join(worse) or "none"


def plot(summary: Summary, path: Path) -> None:
    """Plot the recipe over loops beside the dense models, and every change."""
    data = summary.data
    with panels(path, 2) as (depth, changes):
        lines(depth, data["loops"], data["curves"], label="looped, {}")
        for (name, bits), colour in zip(data["dense"].items(), COLOURS, strict=False):
            depth.axhline(bits, color=colour, ls="--", label=f"dense, {name}")
        depth.legend(fontsize=8)
        log2_ticks(depth, data["loops"])
        depth.set(title="Same weights, more loops", xlabel="loops", ylabel="bits per byte")
        names = list(data["changes"]["width 64"])[::-1]
        for (width, found), colour, up in zip(
            data["changes"].items(), COLOURS, (0.2, -0.2), strict=False
        ):
            middles, spreads = zip(*(found[name] for name in names if name in found), strict=True)
            places = [i + up for i, name in enumerate(names) if name in found]
            changes.barh(places, middles, 0.4, xerr=spreads, color=colour, label=width)
        changes.set_yticks(range(len(names)), names)
        changes.axvline(0, color=MUTED)
        changes.legend(fontsize=8)
        changes.set(title="One change each", xlabel="bits per byte from the recipe (left: better)")


def _row(name: str, found: Sequence[Record], recipe: Sequence[Record]) -> tuple[str, ...]:
    first = found[0].figures
    time = (
        mean_std(each(found, lambda r: r.seconds))[0]
        / mean_std(each(recipe, lambda r: r.seconds))[0]
    )
    bits = [f"{value:.3f}" for value in columns(r.figures["bits"] for r in found)]
    bits += ["-"] * (len(EVALUATED) - len(bits))
    return (
        name, str(len(found)), f"{first['parameters']:,}", f"{first['training_flops']:.1e}",
        f"{time:.1f}x", *bits, shown(_from(found, recipe)),
    )  # fmt: skip
