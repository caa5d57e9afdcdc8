"""C2: which injections survive which learning rates?"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from experiments.c2_stability.arms import build_arm
from experiments.claim import QUICK, Cell, Claim, Place, Record, Summary, sweep, verdict
from experiments.figure import COLOURS, panels
from experiments.spread import mean_std
from experiments.text import VOCABULARY, standard_library, validation
from open_mythos.data import Batch, Loader, TokenShards
from open_mythos.devices import autocast, resolve_device, resolve_dtype
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.trace import LoopTrace
from open_mythos.ops.cross_entropy import linear_cross_entropy
from open_mythos.seeding import seeded_generator
from open_mythos.train import (
    DepthConfig,
    DepthPlan,
    OptimConfig,
    TrainConfig,
    build_optimizer,
    learning_rate,
)

ARMS: dict[str, dict[str, Any]] = {
    "concat": {"rule": "concat", "prelude_norm": False},
    "concat-sandwich": {"rule": "sandwich", "prelude_norm": False},
    "additive": {"rule": "additive", "prelude_norm": False},
    "predecessor": {"rule": "predecessor", "prelude_norm": False},
    "lti-no-prelude-norm": {"rule": "stable", "prelude_norm": False},
    "lti-euler": {"rule": "stable", "prelude_norm": True, "injection_rule": "euler"},
    "lti": {"rule": "stable", "prelude_norm": True},
}
UNCONSTRAINED = ("concat", "additive")
CONSTRAINED = "lti"
RATIO = 2.0
LEARNING_RATES = {"cpu": (3e-3, 1e-2, 2e-2, 4e-2), "gpu": (3e-4, 1e-3, 3e-3, 1e-2, 2e-2)}

CLAIM = Claim.read(__file__, vars())

_CPU: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "steps": 300, "warmup": 10, "patience": 100, "batch": 8,
    "mean_loops": 6, "max_loops": 12, "eval_loops": [1, 4, 16, 32], "val_windows": 64,
    "log_every": 10,
}  # fmt: skip
_RUNS: dict[str, dict[str, Any]] = {
    "cpu": _CPU,
    "gpu": _CPU | {"device": "cuda", "dtype": "bfloat16", "steps": 500, "warmup": 50,
                   "patience": 200, "batch": 32, "mean_loops": 8, "max_loops": 16},
    QUICK: _CPU | {"steps": 5, "warmup": 2, "batch": 4, "val_windows": 4, "eval_loops": [1, 4]},
}  # fmt: skip
_WIDTHS = {"cpu": (64, 4, 32), "gpu": (512, 8, 256), QUICK: (32, 2, 16)}


def cells(scale: str) -> list[Cell]:
    """Return every arm at every learning rate with three seeds."""
    quick = scale == QUICK
    arms, rates = (["concat", "lti"], [3e-3]) if quick else (ARMS, LEARNING_RATES[scale])
    grid = {f"{arm}-lr{lr:g}": _settings(arm, lr, scale) for arm in arms for lr in rates}
    return sweep(grid, [0] if quick else range(3))


def _settings(arm: str, lr: float, scale: str) -> dict[str, Any]:
    dim, heads, seq_len = _WIDTHS[scale]
    fields = dict(ARMS[arm])
    rule = fields.pop("rule")
    model = {
        "vocab_size": VOCABULARY, "dim": dim, "n_heads": heads, "n_kv_heads": heads,
        "attn_type": "gqa", "max_seq_len": seq_len, "n_experts": 0, "lora_rank": 0,
        "prelude_layers": 1, "coda_layers": 1, "ffn_dim": 2 * dim, "readout": False,
        "tie_embeddings": True, **fields,
    }  # fmt: skip
    return _RUNS[scale] | {"arm": arm, "rule": rule, "lr": lr, "seq_len": seq_len, "model": model}


SPIKE = 1.3
"""A loss above this multiple of its running minimum for ``patience`` steps is divergence."""
GROWTH = 1e3
"""A final state this many times larger than the initial state is divergence."""


@dataclass
class Watch:
    """Detect divergence of a training run."""

    patience: int
    lowest: float = math.inf
    above: int = 0
    largest_growth: float = 0.0

    def sees(self, loss: float, growth: float) -> str:
        """Return the kind of divergence, or ""; ``growth`` is ||h_T|| / ||h_0||."""
        if not math.isfinite(loss) or not math.isfinite(growth):
            self.largest_growth = math.inf
            return "not finite"
        self.largest_growth = max(growth, self.largest_growth)
        self.lowest = min(self.lowest, loss)
        self.above = self.above + 1 if loss > SPIKE * self.lowest else 0
        if self.above >= self.patience:
            return "loss"
        return "state" if growth > GROWTH else ""


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Train and return divergence, state norms, and the loss at each depth."""
    s = cell.settings
    device, folder = resolve_device(s["device"]), standard_library(place.shared)
    model = build_arm(s["rule"], s["model"], cell.seed).to(device)
    watch, curve = Watch(s["patience"]), []
    ended = ""
    for loss, growth in _training(model, cell, folder, device):
        curve.append(loss)
        if ended := watch.sees(loss, growth):
            break
    return {
        "diverged": ended,
        "step": len(curve),
        "curve": curve[:: s["log_every"]],
        "largest_growth": watch.largest_growth,
        "rho": model.recurrent.injection.spectral_radius().item(),
        "parameters": sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if not re.match("embedding|head", name) and "halting" not in name
        ),
        **({} if ended else _measured(model, folder, s, device)),
    }


def _training(
    model: OpenMythos, cell: Cell, folder: Path, device: torch.device
) -> Iterator[tuple[float, float]]:
    """Yield loss (NaN where the gradient is not finite) and ||h_T|| / ||h_0|| of every step."""
    s = cell.settings
    config = TrainConfig(steps=s["steps"], warmup_steps=s["warmup"], schedule="constant")
    optim = OptimConfig(lr=s["lr"])
    plan = DepthPlan(DepthConfig(mean=s["mean_loops"], max_loops=s["max_loops"]), cell.seed)
    loader = Loader(
        TokenShards(folder), seq_len=s["seq_len"], global_batch=s["batch"], seed=cell.seed
    )
    optimizer = build_optimizer(model, optim)
    for step in range(s["steps"]):
        batch, trace = loader.next_batch(step).to(device), LoopTrace()
        loops = int(plan.depths(step, [0])[0])
        # h_0 of standard deviation 1: there has to be something that the state can grow from
        generator = seeded_generator(cell.seed, "c2/h0", step)
        shape = (*batch.input_ids.shape, model.cfg.dim)
        h_BTD = torch.randn(shape, generator=generator).to(device)
        with autocast(device, resolve_dtype(s["dtype"])):
            loss = _loss(model, batch, loops, h_BTD, trace)
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), config.clip)
        growth = trace.state_norm[loops - 1].mean() / h_BTD.norm(dim=-1).mean()
        yield loss.item() if norm.isfinite() else math.nan, growth.item()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config, optim)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _loss(model: OpenMythos, batch: Batch, loops: int, h_BTD: Tensor, trace: LoopTrace) -> Tensor:
    """Compute the loss after ``loops`` loops from h_0 = ``h_BTD``."""
    ctx = model.context(batch.input_ids)
    *_, (_, last_BTD) = model.unroll(batch.input_ids, loops, ctx, h_BTD=h_BTD, trace=trace)
    return linear_cross_entropy(model.final_hidden(last_BTD, ctx), model.head.weight, batch.targets)


@torch.no_grad()
def _measured(
    model: OpenMythos, folder: Path, s: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Measure the validation loss at several depths from h_0 = 0, and the state on the way."""
    model.eval()
    batches = validation(folder, seq_len=s["seq_len"], windows=s["val_windows"])
    batches = [batch.to(device) for batch in batches]
    h_BTD = torch.zeros(*batches[0].input_ids.shape, model.cfg.dim, device=device)
    trace = LoopTrace()
    losses = {
        str(loops): mean(_loss(model, batch, loops, h_BTD, trace).item() for batch in batches)
        for loops in sorted(s["eval_loops"])
    }
    return {
        "loss": losses,
        "state_norm": [norm.mean().item() for norm in trace.state_norm.values()],
        "delta_norm": [norm.mean().item() for norm in trace.delta_norm.values()],
    }


Grid = dict[str, dict[float, list[Record]]]
"""Arm -> learning rate -> records, one per seed."""
_SHOWN_LOOPS = "16"


def summarise(records: Sequence[Record]) -> Summary:
    """Find the largest stable learning rate of every arm and judge their ratio."""
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
    """Return the highest learning rate up to which no seed diverges, or 0."""
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
    """Return the ratio of two stable rates; 0 if ours is stable at none."""
    return ours / theirs if theirs else math.inf if ours else 0.0


def plot(summary: Summary, path: Path) -> None:
    """Plot loss and state growth against the learning rate; lines end at divergence."""
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
    """Return the mean loss, or NaN (not plotted) if a seed diverged."""
    if any(record.figures["diverged"] for record in found):
        return float("nan")
    return mean(record.figures["loss"][_SHOWN_LOOPS] for record in found)


def _growth(found: Sequence[Record]) -> float:
    """Return the largest growth of any seed; infinite if one was not finite."""
    growths = [record.figures["largest_growth"] for record in found]
    return float("inf") if None in growths else max(growths)
