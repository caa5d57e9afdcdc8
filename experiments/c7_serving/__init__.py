"""C7: how many more tokens does batching by depth serve?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.depths import depths, jobs
from benchmarks.engine_forms import ENGINE, EXACT, Comparison, compare_forms
from benchmarks.models import QUICK as QUICK_SCALE
from benchmarks.models import build
from benchmarks.static_batch import COMPACT, FULL, LOCKSTEP
from experiments.c1_depth.chain_recipe import recipe
from experiments.c7_serving.gates import of_chains, of_text
from experiments.claim import QUICK, Cell, Claim, Place, Record, Summary, verdict
from experiments.figure import COLOURS, MUTED, panels
from experiments.spread import by_arm, over_seeds, shown
from experiments.text import VOCABULARY

SLOTS, MEAN, TURNS = 16, 6.0, 2
FASTER, OF_BOUND = 2.0, 0.9
CHAINS, TEXT = "gate on chains", "gate on text"
RANDOM = ("geometric", "lognormal", "two depths")
MIXED = "lognormal, 4 to 32 tokens"

CLAIM = Claim.read(__file__, vars())

_SIZE: dict[str, Any] = {
    "dim": 512, "experts": [16, 2], "slots": SLOTS, "prompt": 8, "turns": TURNS, "loops": 16,
    "mean": MEAN, "shape": "", "jobs": 16, "tokens": [48, 48],
}  # fmt: skip


_TEXT_RUN: dict[str, Any] = {
    "model": {
        "vocab_size": VOCABULARY, "dim": 96, "n_heads": 4, "n_kv_heads": 4, "attn_type": "gqa",
        "max_seq_len": 64, "max_loop_iters": 8, "n_experts": 0, "lora_rank": 0,
        "prelude_layers": 0, "coda_layers": 0, "ffn_dim": 192, "tie_embeddings": True,
    },
    "depth": {"plan": "poisson", "mean": 4},
    "optim": {"lr": 4e-3},
    "train": {
        "steps": 400, "seq_len": 64, "global_batch": 8, "warmup_steps": 40, "device": "cpu",
        "min_lr_ratio": 0.02, "log_every": 20,
    },
}  # fmt: skip


def cells(scale: str) -> list[Cell]:
    """Return three cells per random distribution of depths, and one per trained gate."""
    if scale == QUICK:
        small = {"dim": 64, "experts": [4, 2], "slots": 4, "turns": 1, "jobs": 6, "loops": 4,
                 "mean": 2.0, "tokens": [3, 5], "shape": "geometric"}  # fmt: skip
        return [Cell("geometric", 0, _SIZE | small)]
    arms = {shape: _SIZE | {"shape": shape} for shape in RANDOM}
    arms[MIXED] = _SIZE | {"shape": "lognormal", "jobs": 64, "tokens": [4, 32]}
    arms[CHAINS] = _SIZE | {
        "run": recipe().to_dict(), "gate_rows": 256, "gate": {"n_loops": 16},
        "threshold": "gate:0.99", "tokens": [45, 45],
    }  # fmt: skip
    arms[TEXT] = _SIZE | {
        "run": _TEXT_RUN, "save_every": 0, "val_windows": 32, "gate": {"n_loops": 12},
        "threshold": "gate:0.7", "loops": 12,
    }  # fmt: skip
    return [
        Cell(arm, seed, settings) for arm, settings in arms.items()
        for seed in range(1 if "run" in settings else 3)
    ]  # fmt: skip


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Replay the depths of an arm in all forms."""
    s, draw = cell.settings, random.Random(cell.seed)
    lengths = [draw.randint(*s["tokens"]) for _ in range(s["jobs"])]
    given = {CHAINS: of_chains, TEXT: of_text}
    if cell.arm in given:
        found = given[cell.arm](cell, place)
    else:
        found = depths(s["shape"], sum(lengths), s["mean"], s["loops"], cell.seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        size = replace(QUICK_SCALE, dim=s["dim"], n_loops=s["loops"])
        model = build(size, "mla", tuple(s["experts"])).eval()
        work = jobs(lengths, found, s["prompt"], s["loops"], model.cfg.vocab_size, seed=cell.seed)
        return _figures(compare_forms(model, work, s["loops"], s["slots"], turns=s["turns"]))
    finally:
        torch.set_num_threads(threads)


def _figures(found: Comparison) -> dict[str, Any]:
    return found.numbers() | {
        "full": found.ratio(ENGINE, FULL), "lockstep": found.ratio(ENGINE, LOCKSTEP),
        "compact": found.ratio(ENGINE, COMPACT), "exact": found.ratio(EXACT, ENGINE),
        "of_bound": found.of_bound,
    }  # fmt: skip


def summarise(records: Sequence[Record]) -> Summary:
    """Compare the engine with every static form and with the bound."""
    arms = by_arm(records)
    ratio = {
        arm: {key: mean(r.figures[key] for r in found) for key in _KEYS}
        for arm, found in arms.items()
    }
    asked = [ratio[shape] for shape in RANDOM]
    holds = all(each["full"] >= FASTER and each["of_bound"] >= OF_BOUND for each in asked)
    static = [each[form] for each in ratio.values() for form in (FULL, LOCKSTEP, COMPACT)]
    in_part = min(static) > 1 and max(each["full"] for each in ratio.values()) >= FASTER
    low, high = (pick(each["full"] for each in asked) for pick in (min, max))
    share = [pick(each["of_bound"] for each in asked) for pick in (min, max)]
    return Summary(
        verdict(holds, in_part),
        f"At a mean depth of {MEAN:g} of 16 and equal lengths the engine serves {low:.2f} to "
        f"{high:.2f} times the tokens of full depth, {share[0]:.0%} to {share[1]:.0%} of the "
        f"bound; with 4 to 32 tokens {ratio[MIXED]['full']:.2f} times, and "
        f"{ratio[MIXED]['lockstep']:.2f} times those of a batch in lockstep. At the depths of "
        f"trained gates: {ratio[CHAINS]['full']:.2f} times full depth and "
        f"{ratio[CHAINS]['lockstep']:.2f} times lockstep on chains, {ratio[TEXT]['full']:.2f} and "
        f"{ratio[TEXT]['lockstep']:.2f} times on text. Rows that only leave are close: the engine "
        f"serves {min(e['compact'] for e in ratio.values()):.2f} to "
        f"{max(e['compact'] for e in ratio.values()):.2f} times as much. Exact mode serves "
        f"{min(e['exact'] for e in ratio.values()):.2f} to "
        f"{max(e['exact'] for e in ratio.values()):.2f} times as much as the fast one.",
        f"{low:.2f}-{high:.2f}x full depth, {share[0]:.0%}-{share[1]:.0%} of the bound",
        ("depths", "mean depth", "tokens per CPU s", "x full depth", "x lockstep", "x compact",
         "exact / fast", "bound", "of the bound"),
        [_row(arm, found) for arm, found in arms.items()],
        {"arms": list(arms), **{key: [each[key] for each in ratio.values()] for key in _KEYS}},
    )  # fmt: skip


_KEYS = ("full", "lockstep", "compact", "exact", "of_bound", "bound")


def _row(arm: str, found: Sequence[Record]) -> tuple[str, ...]:
    def figure(key: str, digits: int = 2) -> str:
        return shown(over_seeds(found, key), digits)

    return (
        arm, figure("mean_depth", 1), figure("engine, tokens per CPU s", 0), figure("full"),
        figure("lockstep"), figure("compact"), figure("exact"), figure("bound"),
        figure("of_bound"),
    )  # fmt: skip


def plot(summary: Summary, path: Path) -> None:
    """Plot the engine's ratio to every static form, and the bound."""
    data, forms = summary.data, (FULL, LOCKSTEP, COMPACT)
    places = range(len(data["arms"]))
    with panels(path, 1, size=(9, 4.5)) as (ax,):
        for i, form in enumerate(forms):
            at = [place + (i - 1) * 0.26 for place in places]
            ax.bar(at, data[form], 0.25, color=COLOURS[i], label=f"against {form}")
        at = [place - 0.26 for place in places]
        ax.plot(at, data["bound"], "_", color="black", ms=22, label="bound against full")
        ax.axhline(1, color=MUTED, lw=1)
        ax.set_xticks(list(places), data["arms"], fontsize=8)
        ax.set(title="Tokens served by the engine", ylabel="times those of a static batch")
        ax.legend()
