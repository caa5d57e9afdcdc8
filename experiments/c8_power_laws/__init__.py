"""C8: do optimal loops and tokens follow power laws of the budget?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.claim import QUICK, Cell, Claim, Place, Record, Summary, sweep, verdict
from experiments.figure import COLOURS, panels
from experiments.spread import by_arm, each, mean_std, shown
from experiments.text import Sizes, train
from open_mythos.accounting import account
from open_mythos.config import MythosConfig

MUS = (1, 2, 4, 8)
BUDGETS = (2e12, 5e12, 1.25e13)
SEEDS = 2
RESAMPLES = 1000

CLAIM = Claim.read(__file__, vars())
_SIZES = Sizes(
    train={"steps": 1, "seq_len": 128, "warmup_steps": 1, "global_batch": 16},
    widths={"cpu": (64, 4), "gpu": (512, 8), QUICK: (32, 2)},
    val_windows=512, gpu_seq_len=512, quick_steps=3,
)  # fmt: skip


def cells(scale: str) -> list[Cell]:
    """Return every number of loops at every budget, the smallest budget first."""
    if scale == QUICK:
        return sweep({"mu2-tiny": _settings(2, 1e7, scale)}, [0])
    grid = [(mu, budget) for budget in BUDGETS for mu in MUS]
    arms = {name(*point): _settings(*point, scale) for point in grid}
    return sorted(sweep(arms, range(SEEDS)), key=lambda cell: cell.seed)


def name(mu: int, budget: float) -> str:
    """Return the name of an arm."""
    return f"mu{mu}-{budget:g}".replace("+", "")


def _settings(mu: int, budget: float, scale: str) -> dict[str, Any]:
    settings = _SIZES.settings(
        scale, lr=1e-2 if mu == 1 else 4e-2, depth={"plan": "fixed", "mean": mu},
        model={"max_loop_iters": mu, "prelude_layers": 0, "recurrent_layers": 2, "coda_layers": 0},
    )  # fmt: skip
    settings["run"]["optim"]["name"] = "muon"
    train = settings["run"]["train"]
    per_token = account(
        MythosConfig(**settings["run"]["model"]), context=train["seq_len"]
    ).training_flops(mu)
    train["steps"] = max(2, round(budget / per_token / train["seq_len"] / train["global_batch"]))
    train["warmup_steps"] = max(1, train["steps"] // 10)
    return {"mu": mu, "budget": budget, "per_token": per_token, **settings}


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Train one model and measure its loss at the loops of its training."""
    trained = train(cell, place)
    return trained.costs() | {"loss": trained.losses([cell.settings["mu"]])[0]}


def optimum(mus: Sequence[float], losses: Sequence[float]) -> tuple[float, bool]:
    """Return mu* of a parabola in log2 mu, within the range, and whether it is a minimum inside."""
    x = np.log2(mus)
    square, linear, _ = np.polyfit(x, losses, 2)
    if square <= 0:
        return float(mus[int(np.argmin(losses))]), False
    best = -linear / (2 * square)
    return float(2 ** np.clip(best, x[0], x[-1])), bool(x[0] < best < x[-1])


def slope(budgets: Sequence[float], values: Sequence[float]) -> float:
    """Return the exponent of a power law through ``values``."""
    return float(np.polyfit(np.log(budgets), np.log(values), 1)[0])


def _tokens(mu: float, budget: float, per_token: dict[int, float]) -> float:
    """Return the tokens of a budget at ``mu`` loops, whose cost is linear in mu."""
    return budget / float(np.interp(mu, MUS, [per_token[m] for m in MUS]))


def summarise(records: Sequence[Record]) -> Summary:
    """Fit a parabola to every budget and a power law to the optima."""
    arms = by_arm(records)
    losses = {(mu, c): each(arms[name(mu, c)], "loss") for c in BUDGETS for mu in MUS}
    per_token = {mu: arms[name(mu, BUDGETS[0])][0].settings["per_token"] for mu in MUS}

    def laws(pick: Any) -> tuple[float, float, list[float], list[bool]]:
        found = [optimum(MUS, [float(pick(losses[mu, c])) for mu in MUS]) for c in BUDGETS]
        best = [mu for mu, _ in found]
        tokens = [_tokens(mu, c, per_token) for mu, c in zip(best, BUDGETS, strict=True)]
        return slope(BUDGETS, best), slope(BUDGETS, tokens), best, [inside for _, inside in found]

    of_mu, of_tokens, best, inside = laws(np.mean)
    rng = np.random.default_rng(0)
    again = [laws(lambda x: np.mean(rng.choice(x, len(x))))[:2] for _ in range(RESAMPLES)]
    (low, high), (low_tokens, high_tokens) = (
        np.quantile([pair[i] for pair in again], (0.025, 0.975)) for i in (0, 1)
    )
    optima = ", ".join(f"{mu:.1f} at {c:.1e}" for mu, c in zip(best, BUDGETS, strict=True))
    return Summary(
        verdict(all(inside) and low > 0, of_mu > 0 and any(inside)),
        f"Optimal loops: {optima} FLOPs. The exponent of the loops is {of_mu:.2f} [{low:.2f}, "
        f"{high:.2f}], that of the tokens {of_tokens:.2f} [{low_tokens:.2f}, {high_tokens:.2f}]; "
        f"{sum(inside)} of {len(BUDGETS)} parabolas have their minimum inside 1 .. {MUS[-1]}.",
        f"loops ~ C^{of_mu:.2f} [{low:.2f}, {high:.2f}], tokens ~ C^{of_tokens:.2f}",
        ("budget", *(f"{mu} loops" for mu in MUS), "steps", "optimum"),
        [(f"{c:.2e}", *(shown(mean_std(losses[mu, c])) for mu in MUS),
          " / ".join(str(arms[name(mu, c)][0].settings["run"]["train"]["steps"]) for mu in MUS),
          f"{star:.1f}") for c, star in zip(BUDGETS, best, strict=True)],
        {"losses": {c: [mean_std(losses[mu, c]) for mu in MUS] for c in BUDGETS}, "best": best},
    )  # fmt: skip


def plot(summary: Summary, path: Path) -> None:
    """Plot loss against loops for every budget, and the optima against the budget."""
    data = summary.data
    with panels(path, 2) as (loss, law):
        for (budget, values), colour in zip(data["losses"].items(), COLOURS, strict=False):
            middles, spreads = zip(*values, strict=True)
            loss.errorbar(MUS, middles, spreads, fmt="o", capsize=3, color=colour,
                          label=f"{budget:.1e} FLOPs")  # fmt: skip
            x = np.linspace(0, math.log2(MUS[-1]), 60)
            curve = np.polyval(np.polyfit(np.log2(MUS), middles, 2), x)
            loss.plot(2**x, curve, color=colour)
        loss.set_xscale("log", base=2)
        loss.set(title="Loss against loops at equal FLOPs", xlabel="loops", ylabel="nats per byte")
        loss.legend(fontsize=8)
        law.plot(list(data["losses"]), data["best"], "o-", color=COLOURS[0])
        law.set(title="Optimal loops", xlabel="training FLOPs", ylabel="loops", xscale="log")
