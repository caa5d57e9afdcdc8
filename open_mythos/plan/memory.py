"""Bytes that a GPU holds at the worst moment of a training step, and what they are for.

They are those of the traced step (:mod:`open_mythos.plan.trace`). Counts of the parameters give
quick bounds, which rule most layouts out before any is traced.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import lcm

from open_mythos.ops.experts.sizes import DEFERRED_TOKENS
from open_mythos.plan.job import Job, Layout
from open_mythos.plan.parameters import ROOT, Parameter
from open_mythos.plan.trace import BACKWARD, FORWARD, UPDATE, Bytes, StepTrace, trace_step
from open_mythos.plan.tracker import Part

FLOAT32, HALF = 4, 2
"""Bytes of an element."""
TRACED_LOOPS = 3
"""Loops with gradient of a shallow trace; every further one leaves as much as the last of them."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at its worst moment.

    Attributes:
        parts: What for -> bytes; they add up.
        moment: "backward" or "optimizer": when that is.
    """

    parts: dict[str, int]
    moment: str

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())


def memory(job: Job, layout: Layout, *, kernels: str = "cuda") -> Memory:
    """Return what ``layout`` needs for ``job``.

    Args:
        job: What is trained.
        layout: How.
        kernels: The device whose code paths the step takes: "cuda" or "cpu".
    """
    return _worst(_traced(job, layout, kernels, deep=_defers(job, layout)))


def estimate(job: Job, layout: Layout) -> Memory:
    """Return :func:`memory` from a trace of few loops; it differs where gradients are deferred."""
    return _worst(_traced(job, layout, "cuda", deep=False))


def activations_per_loop(job: Job) -> dict[str, float]:
    """Bytes that a loop of a token leaves for the backward pass, by activation checkpointing."""
    found = {}
    for name, checkpoint in (("kept", False), ("checkpointed", True)):
        layout = Layout(1, "none", checkpoint_loops=checkpoint)
        deep_enough = replace(job, n_loops=1, max_loops=max(job.max_loops, 2), grad_loops=None)
        per_loop = _traced(deep_enough, layout, "cuda", deep=False).per_loop
        found[name] = sum(per_loop.values()) / job.context
    return found


def held_bytes(job: Job, layout: Layout) -> int:
    """Count what stays from step to step: weights, optimizer state, averaged weights."""
    total = 0
    for each in job.parameters:
        moments = 1 if job.optimizer == "muon" and each.muon else 2
        copies = 1 + each.trained * (moments + job.ema)
        total += FLOAT32 * copies * local_elements(each, layout)
    return total


def local_elements(parameter: Parameter, layout: Layout) -> int:
    """Return the elements of a parameter that the first GPU stores: the largest shard."""
    if layout.experts > 1 and parameter.expert:
        return parameter.n // layout.experts
    return parameter.chunk(layout.shard) if layout.kind == "fsdp" else parameter.n


def counted_bytes(job: Job, layout: Layout) -> int:
    """Return a lower bound of :func:`memory` without activations, counted from the parameters.

    The larger of two moments: the end of the loop's backward pass, when the weights of the loop or
    their gradients are whole twice, and the optimizer's step.
    """
    here = job.parameters
    grads = FLOAT32 * sum(local_elements(each, layout) for each in here if each.trained)
    if layout.kind != "fsdp":
        return held_bytes(job, layout) + grads
    whole = [each for each in here if not (layout.experts > 1 and each.expert)]
    loop = [each for each in whole if each.unit != ROOT and not each.regathered]
    root = FLOAT32 * sum(padded_elements(each, layout) for each in whole if each.unit == ROOT)
    gathered = FLOAT32 * sum(padded_elements(each, layout) for each in loop)
    summed = FLOAT32 * sum(padded_elements(each, layout) + each.n for each in loop if each.trained)
    return held_bytes(job, layout) + max(root + max(gathered, summed), grads)


def padded_elements(parameter: Parameter, layout: Layout) -> int:
    """Return the elements of a gathered parameter, the padding of its shards included."""
    return layout.shard * parameter.chunk(layout.shard)


def likely_bytes(job: Job, layout: Layout) -> float:
    """Return a quick estimate: :func:`counted_bytes`, or weights and what one GPU would keep.

    Activations are those of one GPU with the whole model, for one and two sequences, extended to
    the micro-batch.
    """
    one, two = (
        _traced(job, Layout(1, "none", 1, 1, layout.checkpoint_loops, n), "cuda", deep=False)
        for n in (1, 2)
    )
    first, second = (each.peaks[FORWARD][Part.ACTIVATIONS.value] for each in (one, two))
    kept = first + (layout.micro_batch - 1) * (second - first)
    root = loop = 0
    if layout.kind == "fsdp":
        here = [each for each in job.parameters if not (layout.experts > 1 and each.expert)]
        root = sum(padded_elements(each, layout) for each in here if not each.regathered)
    elif layout.kind == "ddp":
        loop = sum(each.n for each in job.parameters if each.trained)
    activations = held_bytes(job, layout) + FLOAT32 * (root + loop) + kept
    return max(counted_bytes(job, layout), activations)


def _worst(trace: StepTrace) -> Memory:
    phase = max(trace.peaks, key=lambda name: sum(trace.peaks[name].values()))
    parts: Bytes = trace.peaks[phase]
    moment = "optimizer" if phase == UPDATE else BACKWARD
    return Memory({name: n for name, n in parts.items() if n}, moment)


def _defers(job: Job, layout: Layout) -> bool:
    """Whether gradients of experts may be deferred: how much waits is not affine in the loops."""
    choices = layout.micro_batch * job.context * job.cfg.n_experts_per_tok
    return layout.experts == 1 and choices <= DEFERRED_TOKENS * job.cfg.n_experts


def _traced(job: Job, layout: Layout, kernels: str, deep: bool) -> StepTrace:
    """Trace a step, of few loops unless ``deep``, and extend it to the depth of ``job``."""
    with_gradient = job.last_loops if deep else min(TRACED_LOOPS, job.last_loops)
    truncated = job.last_loops < job.max_loops
    loops = job.max_loops if deep else with_gradient + truncated
    traced = replace(
        job, n_loops=1, max_loops=loops, grad_loops=with_gradient if truncated else None
    )
    found = _step(traced, _alike(layout), kernels)
    return found.at_depth(job.last_loops - with_gradient)


@lru_cache(maxsize=512)
def _step(job: Job, layout: Layout, kernels: str) -> StepTrace:
    return trace_step(job, layout, kernels)


def _alike(layout: Layout) -> Layout:
    """Fewer copies of the model and fewer micro-batches: a GPU needs as much memory for them."""
    few = min(2, layout.micro_batches)
    groups = lcm(layout.shard, layout.experts)
    gpus = groups if layout.gpus == groups else 2 * groups
    return replace(layout, gpus=1 if layout.kind == "none" else gpus, micro_batches=few)
