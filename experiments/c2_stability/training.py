"""Trains one arm at one learning rate until it is done or has diverged."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from experiments.c2_stability.arms import build_arm
from experiments.claim import Cell, Place
from experiments.text import standard_library, validation
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

SPIKE = 1.3
"""A loss above this multiple of its running minimum, for long enough, counts as diverged."""
GROWTH = 1e3
"""So does a state that many times as large as the one the loop started from."""


@dataclass
class Watch:
    """Decides whether a training has diverged.

    Args:
        patience: Steps in a row that the loss may stay above SPIKE times its running minimum.
    """

    patience: int
    lowest: float = math.inf
    above: int = 0
    largest_growth: float = 0.0

    def sees(self, loss: float, growth: float) -> str:
        """Return why training ends at this step, or "" to go on.

        Args:
            loss: Loss of the step.
            growth: ||h_T|| / ||h_0||.
        """
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
    """Train; say whether and when it diverged, what the state did, and the loss at each depth."""
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
