"""Training at real size, as a run does it: whole steps of the trainer, the optimizer included."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.clock import clocked, device, release, shares_text, where_time_goes
from benchmarks.measure import Finding, Measured, attempt, floor, gate
from benchmarks.models import GPU, Scale, looped_dense, noisy, random_ids
from benchmarks.plain import plain_twin
from benchmarks.roofline import training_work
from benchmarks.training import GATE_SHAPE, gradients
from open_mythos.accounting import account
from open_mythos.config import MythosConfig
from open_mythos.data import Batch
from open_mythos.model.mythos import OpenMythos
from open_mythos.train import (
    DepthConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    Trainer,
    build_model,
)  # fmt: skip
from open_mythos.train.monitoring.utilization import device_peak
from open_mythos.variants import variant

GOAL_MFU = 45.0
"""Percent of peak FLOPs, counting executed loops without recompute."""
GOAL_TOKENS = 18_000.0
"""Tokens per second of the mixture of 1 B parameters in 16 loops."""
WARM, STEPS = 2, 3
GATE_LOOPS = 2


def title(scale: Scale) -> str:
    """Return a heading for the rows."""
    return (
        f"training steps with the optimizer, bfloat16, {scale.large_batch} x "
        f"{scale.large_tokens} tokens"
    )


def rows(scale: Scale) -> Iterator[Measured]:
    """Measure the looped dense model and the mixture, eager and compiled."""
    goal = scale is GPU
    dense, mixture = looped_dense(scale), variant(scale.large)
    for name, cfg, checkpoint in (
        ("looped, dense feed-forward", dense, False), (f"mythos_{scale.large}", mixture, True),
    ):  # fmt: skip
        error = None
        for compiled in (True, False):
            if compiled and device().type != "cuda":
                continue  # minutes of compiling: a figure of its own suite there
            label = f"{name}, {cfg.max_loop_iters} loops{', compiled' if compiled else ''}"
            take = partial(_row, scale, cfg, label, checkpoint, compiled, goal, error)
            row = attempt(label, torch.bfloat16, take)
            error = getattr(row, "error", None)
            yield row
            release()


def _row(
    scale: Scale,
    cfg: MythosConfig,
    name: str,
    checkpoint: bool,
    compiled: bool,
    goal: bool,
    error: float | None,
) -> Finding:
    error = _gate(cfg) if error is None else error
    loops, tokens = cfg.max_loop_iters, scale.large_batch * scale.large_tokens
    trainer = _trainer(scale, cfg, checkpoint, compiled)
    steps = iter(range(WARM + STEPS + 2))
    for _ in range(WARM):
        trainer.train_step(next(steps))
    seconds, _ = clocked(lambda: trainer.train_step(next(steps)), STEPS)
    shares = where_time_goes(lambda: trainer.train_step(next(steps)))
    flops = account(cfg, loops).training_flops(context=scale.large_tokens) * tokens / seconds
    limit = floor(training_work(cfg, loops, scale.large_batch, scale.large_tokens), torch.bfloat16)
    assert limit is not None
    peak = data_sheet_peak() or limit.peak
    why = (
        f"{tokens / seconds:,.0f} tok/s, {flops / 1e12:.3g} TFLOP/s of {peak / 1e12:.3g}; "
        f"time of a step: {shares_text(shares)}"
    )
    numbers = {
        "tokens_per_second": tokens / seconds, "mfu": flops / peak, "flops": flops, "peak": peak,
        "of_measured_peak": flops / limit.peak, **shares,
    }  # fmt: skip
    figure: dict[str, Any] = (
        {"value": tokens / seconds, "unit": "tok/s", "goal": GOAL_TOKENS if goal else None}
        if cfg.n_experts
        else {"value": 100 * flops / peak, "unit": "% MFU", "goal": GOAL_MFU if goal else None}
    )
    return Finding(
        name, "bfloat16", **figure, why=why, threads=torch.get_num_threads(), error=error,
        seconds=seconds, floor=limit, numbers=numbers,
    )  # fmt: skip


def _gate(cfg: MythosConfig) -> float:
    """Check gradients of few tokens and loops against the plain implementation."""
    fast = noisy(lambda: OpenMythos(cfg))
    plain, ids = plain_twin(fast), random_ids(*GATE_SHAPE, vocabulary=cfg.vocab_size)
    results = [gradients(form, ids, GATE_LOOPS, torch.bfloat16) for form in (fast, plain)]
    reference = gradients(plain, ids, GATE_LOOPS, torch.float32)
    return gate("pretraining", *results, reference=reference, dtype=torch.bfloat16)[0]


def _trainer(scale: Scale, cfg: MythosConfig, checkpoint: bool, compiled: bool) -> Trainer:
    run = RunConfig(
        model=cfg,
        depth=DepthConfig(plan="fixed", mean=float(cfg.max_loop_iters)),
        optim=OptimConfig(),
        train=TrainConfig(
            steps=1000, seq_len=scale.large_tokens, global_batch=scale.large_batch,
            dtype="bfloat16", checkpoint_loops=checkpoint, compile=compiled,
            device=str(device()), log_every=1000,
        ),
        parallel=ParallelConfig(kind="none"),
    )  # fmt: skip
    return Trainer(build_model(run), _Loader(scale, cfg), run)


class _Loader:
    """The same random tokens at every step."""

    def __init__(self, scale: Scale, cfg: MythosConfig) -> None:
        self.step = 0
        ids = random_ids(scale.large_batch, scale.large_tokens + 1, cfg.vocab_size).cpu()
        index = torch.arange(scale.large_batch)
        self._batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None, index)

    def next_batch(self, step: int) -> Batch:
        """Return the batch."""
        return self._batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def data_sheet_peak() -> float | None:
    """Return the data sheet's bfloat16 FLOPs per second; None if unknown."""
    if device().type != "cuda":
        return None
    return device_peak(torch.cuda.get_device_name(device()), "bfloat16")
