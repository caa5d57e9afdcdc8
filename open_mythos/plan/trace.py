"""One training step of the real model on fake tensors, and the memory that it takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from open_mythos.devices import autocast, resolve_dtype
from open_mythos.model.depth import Depth
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.trace import LoopTrace
from open_mythos.plan.job import Job, Layout
from open_mythos.plan.parameters import model_on_meta
from open_mythos.plan.tracker import Part, StepTracker, dry_run
from open_mythos.train.build import Model
from open_mythos.train.config import OptimConfig, ParallelConfig, RunConfig, TrainConfig
from open_mythos.train.loss import next_token_loss
from open_mythos.train.optimizers.ema import WeightAverage
from open_mythos.train.optimizers.gradients import gradient_norm, scale_gradients
from open_mythos.train.optimizers.optim import build_optimizer, freeze_halting_gate
from open_mythos.train.parallel.parallelize import ParallelModel, parallelize

Bytes = dict[str, int]
"""What for -> bytes."""
FORWARD, BACKWARD, END, UPDATE = "forward", "backward", "end of backward", "optimizer"
"""Phases of a step: until the last loop's backward pass is over; the loop before; all others."""
DEEP = FORWARD, BACKWARD
"""Phases whose peaks grow with every loop."""


@dataclass(frozen=True)
class StepTrace:
    """Memory of one step.

    Attributes:
        held: Bytes that stay from step to step.
        peaks: Phase -> bytes at its peak.
        per_loop: Bytes that one more loop with gradient leaves behind in the forward pass.
    """

    held: Bytes
    peaks: dict[str, Bytes]
    per_loop: Bytes

    def at_depth(self, more_loops: int) -> StepTrace:
        """The trace of a step with ``more_loops`` more loops with gradient."""
        peaks = {
            phase: _added(peak, self.per_loop, more_loops) if phase in DEEP else peak
            for phase, peak in self.peaks.items()
        }
        return StepTrace(self.held, peaks, self.per_loop)


def run_config(job: Job, layout: Layout) -> RunConfig:
    """The run that ``job`` in ``layout`` is."""
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

    It is the step of :class:`open_mythos.train.step.TrainStep`, less what reads values on the host.
    """
    config = run_config(job, layout)
    model = model_on_meta(job.cfg, job.n_layers)
    with dry_run(layout.gpus, kernels) as tracker:
        _materialize(model)
        freeze_halting_gate(model)
        # DDP makes the buckets for its gradients here
        tracker.part = Part.GRADIENTS if layout.kind == "ddp" else Part.WEIGHTS
        parallel = parallelize(model, config)
        step = _Step(job, layout, config, parallel, tracker)
        return step.run()


class _Step:
    """A step under way."""

    def __init__(
        self, job: Job, layout: Layout, config: RunConfig, parallel: ParallelModel,
        tracker: StepTracker,
    ) -> None:  # fmt: skip
        self.job, self.layout, self.parallel, self.tracker = job, layout, parallel, tracker
        model: Model = parallel.model
        tracker.part = Part.MOMENTS
        self.optimizer = build_optimizer(model, config.optim)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._make_moments()
        tracker.part = Part.AVERAGE
        decay = config.optim.ema_decay
        self.average = WeightAverage(model, decay, parallel.outermost) if decay else None
        self.after_loop: list[Bytes] = []
        if isinstance(model, OpenMythos):
            model.recurrent.blocks[-1].register_forward_hook(self._loop_done)
        tracker.mark_gradients(parallel.outermost)

    def run(self) -> StepTrace:
        """All phases of the step."""
        tracker = self.tracker
        held = tracker.live()
        tracker.part = Part.ACTIVATIONS
        for last in [True] if self.layout.micro_batches == 1 else [False, True]:
            tracker.phase = FORWARD
            self.after_loop.clear()
            self._micro_batch(last)
        per_loop = _difference(self.after_loop)
        tracker.part, tracker.phase = Part.UPDATE, UPDATE
        self.parallel.finish_gradients()
        scale_gradients(self.parameters, 1 / (gradient_norm(self.parameters) + 1e-6))
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
        return StepTrace(held, dict(tracker.peaks), per_loop)

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
            # a logged step: the trace also measures how alike the states of tokens are
            depth = Depth(job.max_loops, grad_loops=job.grad_loops)
            arguments |= {"depth": depth, "trace": LoopTrace(keep_correlation=True)}
        with autocast(ids.device, resolve_dtype(job.dtype)):
            out = self.parallel.train_on(next_token_loss, last=last, **arguments)
        out.total.backward()

    def _loop_done(self, block: nn.Module, inputs: Any, output: Tensor) -> None:
        """Note what the loops so far have left, and when the last one's backward pass is over."""
        if self.tracker.phase != FORWARD or len(self.after_loop) == self.job.max_loops:
            return  # a loop that is recomputed
        self.after_loop.append(self.tracker.live())
        phase = {1: BACKWARD, 2: END}.get(self.job.max_loops - len(self.after_loop))
        if phase is not None and output.requires_grad:
            output.register_hook(partial(self._enter, phase))

    def _enter(self, phase: str, grad: Tensor) -> None:
        self.tracker.phase = phase

    @torch.no_grad()
    def _make_moments(self) -> None:
        """Take a step without effect: optimizers make their state in the first one."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _added(peak: Bytes, more: Bytes, times: int) -> Bytes:
    return {part: n + times * more.get(part, 0) for part, n in peak.items()}


def _difference(after_loop: list[Bytes]) -> Bytes:
    """What the last loop has left."""
    if len(after_loop) < 2:
        return {}
    before, after = after_loop[-2:]
    return {part: n - before[part] for part, n in after.items()}


def _materialize(model: nn.Module) -> None:
    """Replace the shapes of ``model`` by tensors of the device, shared ones once."""
    made: dict[Tensor, Tensor] = {}

    def of(shape: Tensor) -> Tensor:
        if shape not in made:
            made[shape] = torch.empty_like(shape, device="cpu")
        return made[shape]

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            data = of(parameter)
            if not isinstance(data, nn.Parameter):
                data = made[parameter] = nn.Parameter(data, parameter.requires_grad)
            setattr(module, name, data)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, of(buffer))
