"""One training step of the real model on fake tensors, and its memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from open_mythos.devices import autocast, resolve_dtype
from open_mythos.model.depth import Depth
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.trace import LoopTrace
from open_mythos.plan.job import EMA_DECAY, Job, Layout
from open_mythos.plan.parameters import build
from open_mythos.plan.tracker import Part, dry_run
from open_mythos.train.config import OptimConfig, ParallelConfig, RunConfig, TrainConfig
from open_mythos.train.loss import next_token_loss
from open_mythos.train.optimizers.ema import WeightAverage
from open_mythos.train.optimizers.gradients import gradient_norm, scale_gradients
from open_mythos.train.optimizers.optim import build_optimizer
from open_mythos.train.parallel.parallelize import ParallelModel, parallelize

Bytes = dict[str, int]
"""Purpose -> bytes."""
FORWARD, BACKWARD, END, UPDATE = "forward", "backward", "end of backward", "optimizer"
"""Phases: forward and the last loop's backward; the previous loop's; the remaining backward."""


@dataclass(frozen=True)
class StepTrace:
    """Memory of one step.

    Attributes:
        peaks: Phase -> bytes at its peak.
        per_loop: Bytes that each further loop with gradient keeps for the backward pass.
    """

    peaks: dict[str, Bytes]
    per_loop: Bytes

    def at_depth(self, more_loops: int) -> StepTrace:
        """Return the trace of a step with ``more_loops`` more loops with gradient."""
        peaks = dict(self.peaks)
        for phase in peaks.keys() & {FORWARD, BACKWARD}:  # their peaks grow with every loop
            peaks[phase] = {
                part: n + more_loops * self.per_loop.get(part, 0)
                for part, n in peaks[phase].items()
            }
        return replace(self, peaks=peaks)


def trace_step(job: Job, layout: Layout, kernels: str = "cuda") -> StepTrace:
    """Run one step of ``job`` in ``layout`` on fake tensors.

    It is :meth:`open_mythos.train.step.Stepper.take` without what reads values on the host.
    """
    config = RunConfig(
        architecture="looped" if job.looped else "dense",
        model=job.cfg,
        optim=OptimConfig(name=job.optimizer, ema_decay=EMA_DECAY if job.ema else 0.0),
        train=TrainConfig(
            seq_len=job.context, global_batch=layout.global_batch, micro_batch=layout.micro_batch,
            dtype=job.dtype, grad_loops=job.grad_loops if job.looped else None,
            checkpoint_loops=layout.checkpoint_loops,
        ),
        parallel=ParallelConfig(kind=layout.kind, shard=layout.shard, experts=layout.experts),
    )  # fmt: skip
    after_loop: list[Bytes] = []
    with dry_run(layout.gpus, kernels) as tracker:

        def loop_done(block: nn.Module, inputs: Any, output: Tensor) -> None:
            """Record the live bytes; hook the backward passes of the last two loops."""
            if tracker.phase != FORWARD or len(after_loop) == job.max_loops:
                return  # a recomputed loop
            after_loop.append(tracker.live())
            phase = {1: BACKWARD, 2: END}.get(job.max_loops - len(after_loop))
            if phase is not None and output.requires_grad:
                output.register_hook(lambda grad: setattr(tracker, "phase", phase))

        model = build(job.cfg, job.n_layers)
        # DDP allocates its gradient buckets here
        tracker.part = Part.GRADIENTS if layout.kind == "ddp" else Part.WEIGHTS
        parallel = parallelize(model, config)
        tracker.part = Part.OPTIMIZER
        optimizer = build_optimizer(model, config.optim)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        _allocate_state(optimizer, parameters)
        tracker.part = Part.AVERAGE
        decay = config.optim.ema_decay
        average = WeightAverage(model, decay, parallel.outermost) if decay else None
        if isinstance(model, OpenMythos):
            model.recurrent.blocks[-1].register_forward_hook(loop_done)
        tracker.mark_gradients(parallel.outermost)
        tracker.part = Part.ACTIVATIONS
        for i in range(layout.micro_batches):
            tracker.phase = FORWARD
            after_loop.clear()
            _micro_batch(job, layout, parallel, last=i + 1 == layout.micro_batches)
        tracker.part, tracker.phase = Part.UPDATE, UPDATE
        parallel.finish_gradients()
        scale_gradients(parameters, 1 / (gradient_norm(parameters) + 1e-6))
        optimizer.step()
        if average is not None:
            average.update()
    before, after = [{}, {}, *after_loop][-2:]
    per_loop = {part: n - before[part] for part, n in after.items()} if before else {}
    return StepTrace(tracker.peaks, per_loop)


@torch.no_grad()
def _allocate_state(optimizer: Optimizer, parameters: list[nn.Parameter]) -> None:
    """Take a step with zero gradients: optimizers allocate their state in the first one."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _micro_batch(job: Job, layout: Layout, parallel: ParallelModel, last: bool) -> None:
    """Run the forward and backward passes of a micro-batch."""
    rows = layout.micro_batch
    ids, targets = (torch.zeros(rows, job.context, dtype=torch.long) for _ in range(2))
    arguments: dict[str, Any] = {
        "input_ids": ids, "targets": targets,
        "step_tokens": layout.global_batch * job.context, "step_sequences": layout.global_batch,
        "sample_seeds": torch.zeros(rows, dtype=torch.long),
    }  # fmt: skip
    if job.looped:
        # a logged step, which also measures the correlation of token states
        depth = Depth(job.max_loops, grad_loops=job.grad_loops)
        arguments |= {"depth": depth, "trace": LoopTrace(keep_correlation=True)}
    with autocast(ids.device, resolve_dtype(job.dtype)):
        out = parallel.train_on(next_token_loss, last=last, **arguments)
    out.total.backward()
