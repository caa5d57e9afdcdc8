"""Peak memory of a GPU during a training step, by purpose.

Peaks come from a traced step (:mod:`open_mythos.plan.trace`). Parameter counts provide quick bounds
that rule out most layouts before any is traced.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import lcm

from open_mythos.checks import checked
from open_mythos.ops.experts.routed import DEFERRED_TOKENS
from open_mythos.plan.job import Job, Layout
from open_mythos.plan.parameters import ROOT, Parameter
from open_mythos.plan.trace import FORWARD, UPDATE, StepTrace, trace_step
from open_mythos.plan.tracker import Part

FLOAT32, HALF = 4, 2
"""Bytes per element."""
TRACED_LOOPS = 3
"""Loops with gradient in a shallow trace; each further loop keeps as much as the last of them."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the peak of a step.

    Attributes:
        parts: Purpose -> bytes.
        phase: Phase of the peak: "backward" (which includes the forward pass) or "optimizer".
    """

    parts: dict[str, int]
    phase: str

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(self.parts.values())


@checked
def memory(job: Job, layout: Layout, *, kernels: str = "cuda", exact: bool = True) -> Memory:
    """Return the peak memory of ``job`` in ``layout``.

    Args:
        job: Training job.
        layout: Layout over GPUs.
        kernels: Device whose code paths the step takes: "cuda" or "cpu".
        exact: Trace all loops if deferred expert gradients make memory nonlinear in their number.
    """
    # deferral is decided per GPU; how much is deferred is not affine in the loops
    choices = layout.micro_batch * job.context * job.cfg.n_experts_per_tok
    defers = layout.experts == 1 and choices <= DEFERRED_TOKENS * job.cfg.n_experts
    peaks = _traced(job, layout, kernels, deep=exact and defers).peaks
    phase = max(peaks, key=lambda name: sum(peaks[name].values()))
    parts = {name: n for name, n in peaks[phase].items() if n}
    return Memory(parts, "optimizer" if phase == UPDATE else "backward")


def activations_per_loop(job: Job) -> dict[str, float]:
    """Return the activation bytes per token and loop, without and with checkpointing."""
    job = replace(job, n_loops=1, max_loops=max(job.max_loops, 2), grad_loops=None)
    found = {}
    for name, checkpoint in (("kept", False), ("checkpointed", True)):
        trace = _traced(job, Layout(1, "none", checkpoint_loops=checkpoint))
        found[name] = sum(trace.per_loop.values()) / job.context
    return found


def held_bytes(job: Job, layout: Layout) -> int:
    """Return the bytes held between steps: weights, optimizer state, averaged weights."""
    total = 0
    for each in job.parameters:
        states = 1 if job.optimizer == "muon" and each.muon else 2
        copies = 1 + each.trained * (states + job.ema)
        total += FLOAT32 * copies * local_elements(each, layout)
    return total


def local_elements(parameter: Parameter, layout: Layout) -> int:
    """Return the elements of a parameter that rank 0 stores: the largest shard."""
    if layout.experts > 1 and parameter.expert:
        return parameter.n // layout.experts
    return parameter.chunk(layout.shard) if layout.kind == "fsdp" else parameter.n


def padded_elements(parameter: Parameter, layout: Layout) -> int:
    """Return the elements of a gathered parameter, including the padding of its shards."""
    return layout.shard * parameter.chunk(layout.shard)


def counted_bytes(job: Job, layout: Layout) -> int:
    """Return a lower bound of :func:`memory` without activations, from parameter counts.

    It is the larger of two points: the end of the loop's backward pass, when the full weights of
    the loop or their gradients exist twice, and the optimizer step.
    """
    grads = FLOAT32 * sum(local_elements(each, layout) for each in job.parameters if each.trained)
    if layout.kind != "fsdp":
        return held_bytes(job, layout) + grads
    whole = [each for each in job.parameters if not (layout.experts > 1 and each.expert)]
    loop = [each for each in whole if each.unit != ROOT and not each.regathered]
    root = sum(padded_elements(each, layout) for each in whole if each.unit == ROOT)
    gathered = sum(padded_elements(each, layout) for each in loop)
    summed = sum(padded_elements(each, layout) + each.n for each in loop if each.trained)
    return held_bytes(job, layout) + max(FLOAT32 * (root + max(gathered, summed)), grads)


def likely_bytes(job: Job, layout: Layout) -> float:
    """Return a quick estimate of :func:`memory`, at least :func:`counted_bytes`.

    Activations are those of one GPU with the whole model, traced for one and two sequences and
    extrapolated to the micro-batch.
    """
    first, second = (
        _traced(job, Layout(1, "none", 1, 1, layout.checkpoint_loops, n))
        .peaks[FORWARD][Part.ACTIVATIONS.value]
        for n in (1, 2)
    )  # fmt: skip
    kept = first + (layout.micro_batch - 1) * (second - first)
    whole = 0
    if layout.kind == "fsdp":
        here = [each for each in job.parameters if not (layout.experts > 1 and each.expert)]
        whole = sum(padded_elements(each, layout) for each in here if not each.regathered)
    elif layout.kind == "ddp":
        whole = sum(each.n for each in job.parameters if each.trained)
    return max(counted_bytes(job, layout), held_bytes(job, layout) + FLOAT32 * whole + kept)


def _traced(job: Job, layout: Layout, kernels: str = "cuda", deep: bool = False) -> StepTrace:
    """Trace a step, of few loops unless ``deep``, and extend it to the depth of ``job``.

    The trace uses at most two copies of the model and two micro-batches: more of them do not change
    the memory of a GPU.
    """
    with_gradient = job.last_loops if deep else min(TRACED_LOOPS, job.last_loops)
    truncated = job.last_loops < job.max_loops
    loops = job.max_loops if deep else with_gradient + truncated
    grad_loops = with_gradient if truncated else None
    traced = replace(job, n_loops=1, max_loops=loops, grad_loops=grad_loops)
    groups = lcm(layout.shard, layout.experts)
    gpus = groups if layout.kind == "none" or layout.gpus == groups else 2 * groups
    small = replace(layout, gpus=gpus, micro_batches=min(2, layout.micro_batches))
    return cached_trace(traced, small, kernels).at_depth(job.last_loops - with_gradient)


cached_trace = lru_cache(maxsize=512)(trace_step)
