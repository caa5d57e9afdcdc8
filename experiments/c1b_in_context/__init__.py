"""C1b: does looping more follow longer chains of facts given in the prompt?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from torch import Tensor

from experiments.claim import (
    QUICK,
    Cell,
    Claim,
    Place,
    Record,
    Summary,
    arms_by_seed,
    sweep,
    verdict,
)
from experiments.figure import COLOURS, lines, log2_ticks, panels
from experiments.spread import at_depth, by_arm, columns, each, share
from experiments.tasks import SMALL, InContextHop, TaskLoader
from experiments.tasks.accuracy import answered
from experiments.training import build, fit, run_of
from open_mythos.accounting import account

TASK = InContextHop(entities=16, stated=8)
TRAINED_HOPS, ASKED_HOPS = 3, 6
CHAINS = 3
"""Chains of a training row, so that no position of a longer chain is new."""
CHOSEN_LOOPS, SHALLOW_LOOPS = 12, 3
SOLVED, DENSE_AT_MOST, AHEAD_POINTS, LEARNT = 0.90, 0.40, 20, 0.90
LOOPED, SINGLE = "looped", "single-chains"
SEEDS = 3
DENSE = ("dense", "dense-equal-depth")
"""The verdict uses the better one."""

_DENSE: dict[str, Any] = {"architecture": "dense", "grad_loops": None}
_ARMS: dict[str, dict[str, Any]] = {
    LOOPED: {"seeds": SEEDS},
    SINGLE: {"chains": 1},
    "dense": _DENSE | {"seeds": SEEDS},
    "dense-equal-depth": _DENSE | {"unrolled": 6, "lr": 1e-3, "seeds": SEEDS},
}
CHANCE = 1 / TASK.stated

CLAIM = Claim.read(__file__, vars())

_RUNS = {
    "cpu": {"dim": 64, "batch": 128, "steps": 2000, "every": 50, "rows": 1024},
    QUICK: {"dim": 16, "batch": 8, "steps": 4, "every": 2, "rows": 16},
}


def cells(scale: str) -> list[Cell]:
    """Return every arm with its seeds, one seed after the other."""
    settings = partial(_settings, scale)
    if scale == QUICK:
        return sweep({LOOPED: settings(), "dense-equal-depth": settings(**_DENSE, unrolled=6)}, [0])
    return arms_by_seed(_ARMS, settings)


def _settings(
    scale: str,
    *,
    architecture: str = "looped",
    unrolled: int | None = None,
    lr: float = 2e-3,
    grad_loops: int | None = 6,
    chains: int = CHAINS,
) -> dict[str, Any]:
    sizes = _RUNS[scale]
    run = {
        "architecture": architecture,
        "model": SMALL | {
            "vocab_size": TASK.vocab_size, "dim": sizes["dim"], "max_seq_len": 32,
            "max_loop_iters": 6, "prelude_layers": 0, "coda_layers": 0, "recurrent_layers": 2,
            "ffn_dim": 2 * sizes["dim"],
        },
        "depth": {"plan": "uniform", "low": 3, "high": 6, "long_share": 0.3, "long_loops": 16},
        "optim": {"lr": lr, "beta2": 0.98},
        "train": {
            "steps": sizes["steps"], "warmup_steps": sizes["steps"] // 20,
            "seq_len": TASK.stated + chains * TRAINED_HOPS, "global_batch": sizes["batch"],
            "min_lr_ratio": 0.02, "grad_loops": grad_loops, "log_every": sizes["every"],
            "device": "cpu",
        },
    }  # fmt: skip
    # from as many hops as there are facts on, the cycle starts over
    ask = {"hops": list(range(1, TASK.stated)), "loops": [1, 2, 3, 4, 6, 8, CHOSEN_LOOPS, 16, 32],
           "rows": sizes["rows"]}  # fmt: skip
    return {"run": run, "unrolled": unrolled, "chains": chains, "ask": ask}


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Train the arm and measure its accuracy over hops and loops on test rows."""
    run, ask = run_of(cell), cell.settings["ask"]
    model = build(run, unrolled=cell.settings["unrolled"])
    loader = TaskLoader(
        TASK, global_batch=run.train.global_batch, hops=TRAINED_HOPS,
        chains=cell.settings["chains"],
    )  # fmt: skip
    curves = fit(model, loader, run)
    return {
        "grid": [
            answered(model, *questions(hops, ask["rows"]), ask["loops"]) for hops in ask["hops"]
        ],
        "curve": curves["loss"],
        "parameters": account(model, context=run.train.seq_len).parameters_without_embedding,
    }


def questions(hops: int, rows: int) -> tuple[Tensor, Tensor]:
    """Draw test rows (B, M + hops) of facts and a chain, and the answers (B,)."""
    batch = TASK.batch(0, global_batch=rows, hops=hops, test=True)
    return batch.input_ids, batch.targets[:, -1]


def summarise(records: Sequence[Record]) -> Summary:
    """Compare the looped model with the better dense one at twice the trained hops."""
    arms = by_arm(records)
    looped = arms[LOOPED]
    deep = _mean(looped, ASKED_HOPS)
    shallow = _mean(looped, ASKED_HOPS, SHALLOW_LOOPS)
    learnt = _mean(looped, TRAINED_HOPS)
    dense = max(_mean(arms[arm], ASKED_HOPS) for arm in DENSE)
    single = _mean(arms[SINGLE], ASKED_HOPS)
    ask = looped[0].settings["ask"]
    return Summary(
        verdict(
            deep >= SOLVED and dense <= DENSE_AT_MOST,
            100 * (deep - dense) >= AHEAD_POINTS,
            unclear="" if learnt >= LEARNT
            else "reading facts was not learnt in these steps; more of them would tell",
        ),
        f"Trained on up to {TRAINED_HOPS} hops through facts of the prompt, the looped model "
        f"answers {learnt:.1%} of {TRAINED_HOPS} hops and {deep:.1%} of {ASKED_HOPS} at "
        f"{CHOSEN_LOOPS} loops, {shallow:.1%} at {SHALLOW_LOOPS} loops; the better dense arm "
        f"{dense:.1%}. With one chain in a row instead of {CHAINS} the looped model answers "
        f"{single:.1%}.",
        f"{ASKED_HOPS} hops {deep:.1%}, dense {dense:.1%}",
        ("arm", "seeds", "parameters", "last loss", *(f"{hops} hops" for hops in ask["hops"])),
        [_row(arm, found) for arm, found in arms.items()],
        {"hops": ask["hops"], "loops": ask["loops"],
         "grid": [columns(r.figures["grid"][i] for r in looped) for i in range(len(ask["hops"]))],
         "arms": {arm: [_mean(found, hops) for hops in ask["hops"]]
                  for arm, found in arms.items()}},
    )  # fmt: skip


def accuracy(record: Record, hops: int, loops: int = CHOSEN_LOOPS) -> float:
    """Return the share of chains of ``hops`` answered at ``loops`` (unused for dense models)."""
    ask = record.settings["ask"]
    row = record.figures["grid"][ask["hops"].index(hops)]
    return at_depth(row, ask["loops"], loops)


def plot(summary: Summary, path: Path) -> None:
    """Plot the looped model over loops, and all arms over hops."""
    data = summary.data
    with panels(path, 2) as (grid, arms):
        lines(grid, data["loops"], dict(zip(data["hops"], data["grid"], strict=True)),
              label="{} hops", small=True)  # fmt: skip
        log2_ticks(grid, data["loops"])
        grid.set(title="Looped, facts in the prompt", xlabel="loops", ylabel="answered",
                 ylim=(0, 1.03))  # fmt: skip
        lines(arms, data["hops"], data["arms"])
        arms.axvspan(0.5, TRAINED_HOPS, color=COLOURS[0], alpha=0.07, lw=0)
        arms.set(title=f"All arms, looped at {CHOSEN_LOOPS} loops",
                 xlabel="hops (shaded: seen in training)", ylim=(0, 1.03))  # fmt: skip


def _mean(found: Sequence[Record], hops: int, loops: int = CHOSEN_LOOPS) -> float:
    return mean(accuracy(record, hops, loops) for record in found)


def _row(arm: str, found: Sequence[Record]) -> tuple[str, ...]:
    loss = mean(each(found, lambda record: record.figures["curve"][-1][1]))
    return (
        arm, str(len(found)), f"{found[0].figures['parameters']:,}", f"{loss:.3f}",
        *(share(found, partial(accuracy, hops=hops)) for hops in found[0].settings["ask"]["hops"]),
    )  # fmt: skip
