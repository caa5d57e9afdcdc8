"""C1: does looping more answer longer chains than those in training?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from experiments.c1_depth.chain_recipe import (
    ASKED_HOPS,
    CHOSEN_LOOPS,
    PAIRS_AFTER,
    TASK,
    TRAINED_HOPS,
    accuracy_grid,
    recipe,
)
from experiments.claim import QUICK, Cell, Claim, Place, Record, Summary, sweep, verdict
from experiments.figure import COLOURS, lines, log2_ticks, panels
from experiments.spread import at_depth, by_arm, columns, each, share, span
from experiments.tasks import ChainLoader
from experiments.training import build, chain_costs, fit, run_of
from open_mythos.evaluation.frozen import frozen
from open_mythos.model.exit_rules import exit_rule
from open_mythos.model.layers.injection import LTIInjection
from open_mythos.model.trace import LoopTrace
from open_mythos.train.build import Model

SOLVED, SHALLOW, DENSE_AT_MOST, PART, DECAY_POINTS = 0.95, 0.60, 0.25, 0.50, 2
SHALLOW_LOOPS, MANY_LOOPS, MOST_LOOPS = TRAINED_HOPS, 64, 128
RULES = ("change:0.05", "kl:0.0001,0.1")
LOOPED, DENSE, LEARNABLE = "looped", "dense", "dense-equal-depth-10-hops"
DENSE_RIVALS = (DENSE, "dense-lr1e-3", "dense-lr4e-3", "dense-equal-flops", "dense-equal-depth")
"""Dense models trained on the same chains; the verdict uses the best."""

_DENSE = {"architecture": "dense", "train.grad_loops": None}
_DEEP = _DENSE | {"unrolled": 10, "optim.lr": 1e-3}
_NO_LONG = {"depth.long_share": 0.0}
_SINGLE = {"pairs_after": None}
ARMS: dict[str, tuple[int, dict[str, Any]]] = {
    LOOPED: (5, {}),
    "single-chains": (1, _SINGLE),
    "no-long-steps": (1, _NO_LONG),
    "fixed-8-loops": (1, _NO_LONG | {"depth.plan": "fixed", "depth.mean": 8.0}),
    "loops-2-to-4": (1, _NO_LONG | {"depth.low": 2, "depth.high": 4}),
    "every-loop": (1, _NO_LONG | {"depth.low": 1}),
    "no-injection": (1, {"injection": False, "model.initial_state": "prelude"}),
    "final-answer-only": (1, {"final_only": True}),
    DENSE: (5, _DENSE),
    "dense-lr1e-3": (1, _DENSE | {"optim.lr": 1e-3}),
    "dense-lr4e-3": (1, _DENSE | {"optim.lr": 4e-3}),
    "dense-equal-flops": (1, _DENSE | {"steps": 3.5}),
    "dense-equal-depth": (1, _DEEP),
    LEARNABLE: (1, _DEEP | _SINGLE | {"hops": ASKED_HOPS}),
}
"""Arm -> seeds, and changes to the recipe: run fields as "section.field", and "steps" (a factor),
"pairs_after", "hops", "final_only", "unrolled", "injection"."""

CLAIM = Claim.read(__file__, vars())


def cells(scale: str) -> list[Cell]:
    """Return every arm with its seeds, longest first."""
    arms = {LOOPED: 1, DENSE: 1} if scale == QUICK else {arm: n for arm, (n, _) in ARMS.items()}
    settings = {arm: _settings(arm, quick=scale == QUICK) for arm in arms}
    return [cell for arm, n in arms.items() for cell in sweep({arm: settings[arm]}, range(n))]


def _settings(arm: str, *, quick: bool) -> dict[str, Any]:
    changes = dict(ARMS[arm][1])
    run = recipe(quick=quick)
    hops, pairs_after = changes.pop("hops", TRAINED_HOPS), changes.pop("pairs_after", PAIRS_AFTER)
    run.train.steps = round(run.train.steps * changes.pop("steps", 1))
    task = {
        "hops": hops,
        "pair_from": None if pairs_after is None else round(pairs_after * run.train.steps),
        "final_only": changes.pop("final_only", False),
        "unrolled": changes.pop("unrolled", None),
        "injection": changes.pop("injection", True),
    }
    values = run.to_dict()
    for name, value in changes.items():
        section, _, key = name.rpartition(".")
        (values[section] if section else values)[key] = value
    del values["train"]["seed"], values["data"]
    whole = arm == LOOPED
    ask = {
        "hops": list(range(2, 16)) if whole else [2, TRAINED_HOPS, 8, ASKED_HOPS, 12],
        "loops": [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, CHOSEN_LOOPS, 32, 48, MANY_LOOPS, 96,
                  MOST_LOOPS],
        "programs": 2048, "longest": ASKED_HOPS, "longest_programs": 10240,
        "rules": list(RULES) if whole else [], "rule_hops": [TRAINED_HOPS, ASKED_HOPS],
        "most_loops": MANY_LOOPS,
    }  # fmt: skip
    if quick:
        ask |= {"hops": [2, 6], "loops": [1, 4], "programs": 200, "longest_programs": 200,
                "most_loops": 4}  # fmt: skip
    return {"run": values, **task, "ask": ask}


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Train the arm and measure it on held-out chains."""
    s = cell.settings
    run = run_of(cell)
    loader = ChainLoader(
        TASK, global_batch=run.train.global_batch, hops=s["hops"], pair_from=s["pair_from"],
        final_only=s["final_only"],
    )  # fmt: skip
    model = build(run, unrolled=s["unrolled"])
    if not s["injection"]:
        without_injection(model)
    curve = fit(model, loader, run)["loss"]
    ask = s["ask"]
    return {
        "grid": accuracy_grid(model, ask["hops"], ask["loops"], ask["programs"]),
        "longest": accuracy_grid(model, [ask["longest"]], ask["loops"], ask["longest_programs"])[0],
        "rules": {rule: _measure_rule(model, rule, ask) for rule in ask["rules"]},
        "curve": curve,
        **chain_costs(model, run, loader, s["hops"]),
    }


def without_injection(model: Model) -> None:
    """Feed the input only as h_0: set B to zero and fix A at its upper bound."""
    for module in model.modules():
        if isinstance(module, LTIInjection):
            torch.nn.init.zeros_(module.B).requires_grad_(False)
            torch.nn.init.constant_(module.log_A, -math.inf).requires_grad_(False)


def _measure_rule(model: Model, rule: str, ask: dict[str, Any]) -> list[dict[str, float]]:
    """Return accuracy and mean loops under ``rule`` for each of ``rule_hops``."""
    found = []
    for hops in ask["rule_hops"]:
        ids_BT, answers_B = TASK.questions(hops, ask["programs"])
        trace = LoopTrace()
        with frozen(model, torch.float32):
            logits_BTV = model(
                ids_BT, n_loops=ask["most_loops"], exit_rule=exit_rule(rule, model), trace=trace
            )
        assert trace.exits is not None
        right_B = logits_BTV[:, -1].argmax(-1) == answers_B
        found.append(
            {
                "accuracy": right_B.float().mean().item(),
                "loops": trace.exits[:, -1].float().mean().item(),
            }
        )
    return found


_SHOWN = (SHALLOW_LOOPS, 10, CHOSEN_LOOPS, MANY_LOOPS, MOST_LOOPS)


def summarise(records: Sequence[Record]) -> Summary:
    """Judge the accuracy on chains of twice the trained length."""
    arms = by_arm(records)
    looped = arms[LOOPED]
    at_chosen, shallow, many = (
        [asked(record, loops) for record in looped]
        for loops in (CHOSEN_LOOPS, SHALLOW_LOOPS, MANY_LOOPS)
    )
    lost = max(columns(r.figures["longest"] for r in looped)) - mean(many)
    dense = {arm: mean(each(arms[arm], asked)) for arm in DENSE_RIVALS}
    solved = min(at_chosen) >= SOLVED and mean(shallow) <= SHALLOW
    rivals_fail = max(dense.values()) <= DENSE_AT_MOST
    by_rule = "; ".join(f"`{rule}` {_by_rule(looped, rule)}" for rule in RULES)
    return Summary(
        verdict(
            solved and rivals_fail and lost <= DECAY_POINTS / 100,
            mean(at_chosen) > PART and rivals_fail,
        ),
        f"Trained on up to {TRAINED_HOPS} hops, the looped model answers {mean(at_chosen):.1%} of "
        f"the unseen chains of {ASKED_HOPS} at {CHOSEN_LOOPS} loops (worst seed "
        f"{min(at_chosen):.1%}), {mean(shallow):.1%} at {SHALLOW_LOOPS} loops and "
        f"{mean(many):.1%} at {MANY_LOOPS} ({100 * lost:.1f} points below its best depth). Dense "
        f"models answer {span(list(dense.values()), '.1%')}; trained on {ASKED_HOPS} hops, "
        f"{asked(arms[LEARNABLE][0]):.1%}. Depth chosen by a rule: {by_rule}.",
        f"{mean(at_chosen):.1%} at {CHOSEN_LOOPS} loops, dense {span(list(dense.values()), '.1%')}",
        ("arm", "seeds", "parameters", "training FLOPs",
         f"{TRAINED_HOPS} hops at {CHOSEN_LOOPS} loops",
         *(f"{ASKED_HOPS} hops at {loops} loops" for loops in _SHOWN)),
        [_row(arm, found) for arm, found in arms.items()],
        _plotted(looped, arms),
    )  # fmt: skip


def asked(record: Record, loops: int = 0, hops: int = ASKED_HOPS) -> float:
    """Return the share of chains of ``hops`` answered at ``loops`` (unused for dense models)."""
    ask, figures = record.settings["ask"], record.figures
    row = figures["longest"] if hops == ASKED_HOPS else figures["grid"][ask["hops"].index(hops)]
    return at_depth(row, ask["loops"], loops)


def _by_rule(looped: Sequence[Record], rule: str) -> str:
    place = looped[0].settings["ask"]["rule_hops"].index(ASKED_HOPS)
    found = [record.figures["rules"][rule][place] for record in looped]
    right, loops = (mean(one[key] for one in found) for key in ("accuracy", "loops"))
    return f"{right:.1%} with {loops:.1f} loops on average"


def _row(arm: str, found: Sequence[Record]) -> tuple[str, ...]:
    dense = len(found[0].figures["longest"]) == 1
    return (
        arm, str(len(found)), f"{found[0].figures['parameters']:,}",
        f"{found[0].figures['training_flops']:.1e}",
        _share(found, CHOSEN_LOOPS, TRAINED_HOPS),
        *("-" if dense and n != CHOSEN_LOOPS else _share(found, n) for n in _SHOWN),
    )  # fmt: skip


def _share(found: Sequence[Record], loops: int, hops: int = ASKED_HOPS) -> str:
    return share(found, lambda record: asked(record, loops, hops))


def _plotted(looped: Sequence[Record], arms: dict[str, list[Record]]) -> dict[str, Any]:
    ask = looped[0].settings["ask"]
    dense = arms[DENSE][0].settings["ask"]["hops"]
    return {
        "hops": ask["hops"],
        "loops": ask["loops"],
        "grid": [
            columns([record.figures["grid"][i] for record in looped])
            for i in range(len(ask["hops"]))
        ],
        "dense_hops": dense,
        "dense": {
            arm: [mean(asked(r, 0, hops) for r in arms[arm]) for hops in dense]
            for arm in (*DENSE_RIVALS, LEARNABLE)
        },
        "depths": {
            arm: (found[0].settings["ask"]["loops"], columns([r.figures["longest"] for r in found]))
            for arm, found in arms.items() if len(found[0].figures["longest"]) > 1
        },
    }  # fmt: skip


def plot(summary: Summary, path: Path) -> None:
    """Plot ``summary.data`` to ``path``."""
    data = summary.data
    with panels(path, 3) as (grid, dense, parts):
        _grid(grid, data)
        lines(dense, data["dense_hops"], data["dense"], "s--", colours=COLOURS[1:], small=True)
        dense.axvspan(0, TRAINED_HOPS, color=COLOURS[0], alpha=0.07, lw=0)
        dense.set(
            title="Dense controls, the same questions", xlabel="hops (shaded: seen in training)",
            ylabel="answered", ylim=(0, 1.03), xlim=(1, max(data["hops"])),
        )  # fmt: skip
        _parts(parts, data)


def _grid(ax: Any, data: dict[str, Any]) -> None:
    """Draw a heat map with hops on the y axis."""
    image = ax.imshow(data["grid"], origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=1)
    ax.set_xticks(range(len(data["loops"])), [str(n) for n in data["loops"]], fontsize=8)
    ax.set_yticks(range(len(data["hops"])), [str(n) for n in data["hops"]])
    for i, row in enumerate(data["grid"]):
        for j, value in enumerate(row):
            colour = "white" if value > 0.6 else "black"
            ax.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=6, color=colour)
    below = sum(hops <= TRAINED_HOPS for hops in data["hops"])
    ax.axhline(below - 0.5, color=COLOURS[1], lw=1.5)
    ax.set(
        title="Looped: % answered, mean of the seeds", xlabel="loops",
        ylabel="hops (line: longest in training)",
    )  # fmt: skip
    ax.figure.colorbar(image, ax=ax, shrink=0.9)


def _parts(ax: Any, data: dict[str, Any]) -> None:
    colours = iter(COLOURS[1:] * 2)
    for arm, (loops, shares) in data["depths"].items():
        if arm == LOOPED:
            ax.plot(loops, shares, "o-", color=COLOURS[0], ms=4, lw=2.5, label=arm)
        else:
            ax.plot(loops, shares, "-", color=next(colours), lw=1.2, label=arm)
    log2_ticks(ax, [1, 2, 5, 10, 24, 64, 128])
    ax.minorticks_off()
    ax.set(
        title=f"{ASKED_HOPS} hops, without parts of the recipe", xlabel="loops", ylabel="answered",
        ylim=(0, 1.03),
    )  # fmt: skip
    ax.legend(fontsize=7)
