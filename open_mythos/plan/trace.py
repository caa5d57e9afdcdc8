"""One training step of the real model on fake tensors, and its memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from open_mythos.devices import autocast, resolve_dtype
from open_mythos.model.depth import Depth
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.trace import LoopTrace
from open_mythos.plan.job import Job, Layout
from open_mythos.plan.parameters import build
from open_mythos.plan.tracker import Part, StepTracker, dry_run
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


def run_config(job: Job, layout: Layout) -> RunConfig:
    """Return the run configuration of ``job`` in ``layout``."""
    return RunConfig(
        architecture="looped" if job.looped else "dense",
        model=job.cfg,
        optim=OptimConfig(name=job.optimizer, ema_decay=0.999 if job.ema else 0.0),
        train=TrainConfig(
            seq_len=job.context, global_batch=layout.global_batch, micro_batch=layout.micro_batch,
            dtype=job.dtype, grad_loops=job.grad_loops if job.looped else None,
            checkpoint_loops=layout.checkpoint_loops,
        ),
        parallel=ParallelConfig(kind=layout.kind, shard=layout.shard, experts=layout.experts),
    )  # fmt: skip


def trace_step(job: Job, layout: Layout, kernels: str = "cuda") -> StepTrace:
    """Run one step of ``job`` in ``layout`` on fake tensors.

    It is :class:`open_mythos.train.step.TrainStep` without the parts that read values on the host.
    """
    config = run_config(job, layout)
    with dry_run(layout.gpus, kernels) as tracker:
        model = build(job.cfg, job.n_layers)
        # DDP allocates its gradient buckets here
        tracker.part = Part.GRADIENTS if layout.kind == "ddp" else Part.WEIGHTS
        return _Step(job, layout, config, parallelize(model, config), tracker).run()


class _Step:
    """A step in progress."""

    def __init__(
        self, job: Job, layout: Layout, config: RunConfig, parallel: ParallelModel,
        tracker: StepTracker,
    ) -> None:  # fmt: skip
        self.job, self.layout, self.parallel, self.tracker = job, layout, parallel, tracker
        model = parallel.model
        tracker.part = Part.OPTIMIZER
        self.optimizer = build_optimizer(model, config.optim)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._allocate_optimizer_state()
        tracker.part = Part.AVERAGE
        decay = config.optim.ema_decay
        self.average = WeightAverage(model, decay, parallel.outermost) if decay else None
        self.after_loop: list[Bytes] = []
        if isinstance(model, OpenMythos):
            model.recurrent.blocks[-1].register_forward_hook(self._loop_done)
        tracker.mark_gradients(parallel.outermost)

    def run(self) -> StepTrace:
        tracker = self.tracker
        tracker.part = Part.ACTIVATIONS
        for i in range(self.layout.micro_batches):
            tracker.phase = FORWARD
            self.after_loop.clear()
            self._micro_batch(last=i + 1 == self.layout.micro_batches)
        before, after = [{}, {}, *self.after_loop][-2:]
        per_loop = {part: n - before[part] for part, n in after.items()} if before else {}
        tracker.part, tracker.phase = Part.UPDATE, UPDATE
        self.parallel.finish_gradients()
        scale_gradients(self.parameters, 1 / (gradient_norm(self.parameters) + 1e-6))
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
        return StepTrace(tracker.peaks, per_loop)

    def _micro_batch(self, last: bool) -> None:
        job, rows = self.job, self.layout.micro_batch
        ids, targets = (torch.zeros(rows, job.context, dtype=torch.long) for _ in range(2))
        arguments: dict[str, Any] = {
            "input_ids": ids, "targets": targets,
            "step_tokens": self.layout.global_batch * job.context,
            "step_sequences": self.layout.global_batch,
            "sample_seeds": torch.zeros(rows, dtype=torch.long),
        }  # fmt: skip
        if job.looped:
            # a logged step, which also measures the correlation of token states
            depth = Depth(job.max_loops, grad_loops=job.grad_loops)
            arguments |= {"depth": depth, "trace": LoopTrace(keep_correlation=True)}
        with autocast(ids.device, resolve_dtype(job.dtype)):
            out = self.parallel.train_on(next_token_loss, last=last, **arguments)
        out.total.backward()

    def _loop_done(self, block: nn.Module, inputs: Any, output: Tensor) -> None:
        """Record the live bytes after a loop; hook the backward passes of the last two loops."""
        if self.tracker.phase != FORWARD or len(self.after_loop) == self.job.max_loops:
            return  # a recomputed loop
        self.after_loop.append(self.tracker.live())
        phase = {1: BACKWARD, 2: END}.get(self.job.max_loops - len(self.after_loop))
        if phase is not None and output.requires_grad:
            output.register_hook(lambda grad: setattr(self.tracker, "phase", phase))

    @torch.no_grad()
    def _allocate_optimizer_state(self) -> None:
        """Take a step with zero gradients: optimizers allocate their state in the first one."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
