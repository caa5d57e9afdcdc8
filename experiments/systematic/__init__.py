"""Can a looped model compose facts that were never composed in training?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from experiments.claim import QUICK, Cell, Claim, Place, Record, Summary, sweep, verdict
from experiments.figure import lines, log2_ticks, panels
from experiments.spread import at_depth, by_arm, columns, share
from experiments.systematic.states import replaced
from experiments.tasks import SMALL, ChainLoader, ComposedFacts, PermHop
from experiments.tasks.accuracy import answered
from experiments.tasks.facts import KINDS
from experiments.training import build, chain_costs, fit, run_of
from open_mythos.model.mythos import OpenMythos
from open_mythos.seeding import seeded_generator
from open_mythos.train.build import Model

TASK = ComposedFacts(PermHop(entities=64, relations=8), lone_share=0.2)
HOPS, LONGER = 2, 3
CHOSEN_LOOPS = 16
SOLVED, DENSE_AT_MOST, AHEAD_POINTS, LEARNT = 0.80, 0.25, 25, 0.90
PAIRS_AFTER = 0.6
"""Share of the steps after which rows hold two chains."""
LOOPED, BETWEEN, SINGLE = "looped", "looped-between-layers", "looped-single-chains"
DENSE = ("dense", "dense-lr1e-3", "dense-equal-depth")
"""The verdict uses the best of them."""

# two dense layers, which two hops need, hold as many parameters as the one that is looped
_DENSE = {"architecture": "dense", "layers": 2, "ffn": 171}
ARMS: dict[str, tuple[int, dict[str, Any]]] = {
    LOOPED: (3, {}),
    BETWEEN: (3, {"around": 1, "ffn": 256}),
    SINGLE: (3, {"pairs": False}),
    "dense": (3, _DENSE),
    "dense-lr1e-3": (1, _DENSE | {"lr": 1e-3}),
    "dense-equal-depth": (3, _DENSE | {"layers": 6, "ffn": 512, "lr": 1e-3}),
}
"""Arm -> (seeds, changes to the looped model)."""

CLAIM = Claim.read(__file__, vars())

_RUNS = {
    "cpu": {"dim": 128, "batch": 256, "steps": 800, "every": 40, "followed": 256, "most": 2048},
    QUICK: {"dim": 16, "batch": 16, "steps": 4, "every": 2, "followed": 16, "most": 16},
}


def cells(scale: str) -> list[Cell]:
    """Return every arm with its seeds."""
    arms = {LOOPED: 1, "dense": 1} if scale == QUICK else {arm: n for arm, (n, _) in ARMS.items()}
    settings = {arm: _settings(scale, **ARMS[arm][1]) for arm in arms}
    return [cell for arm, n in arms.items() for cell in sweep({arm: settings[arm]}, range(n))]


def _settings(
    scale: str,
    *,
    architecture: str = "looped",
    around: int = 0,
    layers: int | None = None,
    ffn: int = 512,
    lr: float = 2e-3,
    pairs: bool = True,
) -> dict[str, Any]:
    sizes = _RUNS[scale]
    run = {
        "architecture": architecture,
        "model": SMALL | {
            "vocab_size": TASK.graph.vocab_size, "dim": sizes["dim"], "max_seq_len": 16,
            "max_loop_iters": 8, "prelude_layers": around, "coda_layers": around, "ffn_dim": ffn,
            "tie_embeddings": True, "readout": False,
        },
        "depth": {"plan": "uniform", "low": 4, "high": 8},
        "optim": {"lr": lr, "beta2": 0.98, "weight_decay": 0.5},
        "train": {
            "steps": sizes["steps"], "warmup_steps": sizes["steps"] // 40,
            "seq_len": 2 * (HOPS + 1), "global_batch": sizes["batch"], "min_lr_ratio": 0.02,
            "log_every": sizes["every"], "eval_every": sizes["every"], "device": "cpu",
        },
    }  # fmt: skip
    ask = {"hops": [HOPS, LONGER], "loops": [2, 4, 8, CHOSEN_LOOPS, 32], "at": 8,
           "followed": sizes["followed"], "most": sizes["most"]}  # fmt: skip
    pair_from = round(PAIRS_AFTER * sizes["steps"]) if pairs else None
    return {"run": run, "layers": layers, "pair_from": pair_from, "ask": ask}


STAGES = ("trained", "known", "lone")
"""Kinds of chains evaluated during training."""


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Train the arm and measure accuracy by kind, hops and loops, and during training."""
    s = cell.settings
    run, ask = run_of(cell), s["ask"]
    model = build(run, n_layers=s["layers"])
    samples = {kind: _questions(kind, HOPS, ask["followed"]) for kind in STAGES}

    def follow(model: Model, depths: list[int]) -> dict[str, float]:
        return {kind: answered(model, *asked, [ask["at"]])[0] for kind, asked in samples.items()}

    loader = ChainLoader(
        TASK, global_batch=run.train.global_batch, hops=HOPS, pair_from=s["pair_from"]
    )
    curves = fit(model, loader, run, *(f"eval/{kind}" for kind in STAGES), evaluate=follow)
    return {
        "answered": {
            str(hops): {
                kind: answered(model, *_questions(kind, hops, ask["most"]), ask["loops"])
                for kind in KINDS
                if (kind, hops) != ("trained", ask["hops"][-1])
            }
            for hops in ask["hops"]
        },
        "replaced": replaced(model, TASK, *_questions("lone", HOPS, ask["most"]), CHOSEN_LOOPS)
        if isinstance(model, OpenMythos)
        else {},
        "curves": curves,
        **chain_costs(model, run, loader, HOPS),
    }


def _questions(kind: str, hops: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return up to ``most`` questions of a kind, the same in every cell."""
    ids_BT, answers_B = TASK.questions(kind, hops)
    generator = seeded_generator(0, f"systematic/{kind}", hops)
    chosen = torch.randperm(len(ids_BT), generator=generator)[:most]
    return ids_BT[chosen], answers_B[chosen]


_SHOWN = ((HOPS, "trained"), (HOPS, "known"), (HOPS, "lone-first"), (HOPS, "lone-last"),
          (HOPS, "lone"), (LONGER, "known"), (LONGER, "lone"))  # fmt: skip


def summarise(records: Sequence[Record]) -> Summary:
    """Compare the looped model with the best dense one on chains of lone facts."""
    arms = by_arm(records)
    looped = arms[LOOPED]
    lone = {arm: mean(accuracy(r, "lone") for r in found) for arm, found in arms.items()}
    longer = {arm: mean(accuracy(r, "known", LONGER) for r in found) for arm, found in arms.items()}
    dense, known = max(lone[arm] for arm in DENSE), mean(accuracy(r, "known") for r in looped)
    steps = {kind: _reached(looped, kind) for kind in STAGES}
    swapped = {kind: mean(r.figures["replaced"][kind] for r in looped)
               for kind in looped[0].figures["replaced"]}  # fmt: skip
    return Summary(
        verdict(
            lone[LOOPED] >= SOLVED and dense <= DENSE_AT_MOST,
            100 * (lone[LOOPED] - dense) >= AHEAD_POINTS,
            unclear="" if known >= LEARNT
            else "the looped model has not learnt the task; more steps would tell",
        ),
        f"Of the two-hop chains of facts never composed in training, the looped model answers "
        f"{lone[LOOPED]:.1%} at {CHOSEN_LOOPS} loops, the best dense arm {dense:.1%}; with layers "
        f"of their own around the loop {lone[BETWEEN]:.1%}, with one chain per row throughout "
        f"{lone[SINGLE]:.1%}. Of held-out chains of known facts it answers {known:.1%}, and of "
        f"chains of {LONGER} known facts, longer than any of training, {longer[LOOPED]:.1%} (one "
        f"chain per row: {longer[SINGLE]:.1%}; the best dense arm "
        f"{max(longer[arm] for arm in DENSE):.1%}). The looped model answers half of the trained "
        f"chains from step {steps['trained']}, of the held-out ones from step {steps['known']}, of "
        f"those of lone facts from step {steps['lone']}. With the state of the first hop replaced "
        f"in every loop by that of another fact to the same entity, it answers "
        f"{swapped['known']:.1%} of the chains of lone facts if that fact is known, "
        f"{swapped['lone']:.1%} if it is lone ({swapped['own']:.1%} with their own).",
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


def accuracy(record: Record, kind: str, hops: int = HOPS) -> float:
    """Return the share answered, for a looped model at the chosen depth."""
    row = record.figures["answered"][str(hops)][kind]
    return at_depth(row, record.settings["ask"]["loops"], CHOSEN_LOOPS)


def plot(summary: Summary, path: Path) -> None:
    """Plot the stages of a looped and a dense model, and accuracy against loops."""
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
        *(share(found, partial(accuracy, kind=kind, hops=hops)) for hops, kind in _SHOWN),
    )  # fmt: skip


def _curve(found: Sequence[Record], kind: str) -> tuple[list[int], list[float]]:
    """Return the steps and the mean over seeds of the share answered."""
    curves = [record.figures["curves"][f"eval/{kind}"] for record in found]
    steps = [step for step, _ in curves[0]]
    return steps, columns([y for _, y in curve] for curve in curves)


def _reached(found: Sequence[Record], kind: str) -> str:
    """Return the first evaluated step at which half is answered."""
    steps, shares = _curve(found, kind)
    return next((f"{n}" for n, y in zip(steps, shares, strict=True) if y >= 0.5), "(none)")


def _by_loops(found: Sequence[Record], hops: int, kind: str) -> list[float]:
    return columns(record.figures["answered"][str(hops)][kind] for record in found)
