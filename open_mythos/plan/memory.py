"""Bytes that a GPU holds at the worst moment of a training step, and what they are for.

What stays from step to step is counted from the parameters; what a step adds is found by running it
in ghost tensors (:mod:`open_mythos.plan.forward`) and keeping the peak. The optimizer's own step is
looked at apart: there are no activations then, but all gradients.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from open_mythos.plan.forward import Batch, Model
from open_mythos.plan.job import Job, Layout
from open_mythos.plan.ops import Ops
from open_mythos.plan.parameters import LOOP, ROOT, Parameter
from open_mythos.plan.tape import (
    ACTIVATIONS,
    COPIES,
    FLOAT32,
    GATHERED,
    GRADIENTS,
    HALF,
    HEAD,
)

WEIGHTS, MOMENTS, AVERAGE, UPDATE = "weights", "moments", "averaged weights", "optimizer's update"
PARTS = (
    WEIGHTS, MOMENTS, AVERAGE, GRADIENTS, GATHERED, COPIES, ACTIVATIONS, HEAD, UPDATE,
)  # fmt: skip
"""What a GPU's memory is for, in the order in which it is shown."""
_MUON = re.compile(r"\.(q|kv|out)_(proj|down|up)\.weight$|\.(gate_up|down)(\.weight)?$")


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


def memory(job: Job, layout: Layout, *, cuda: bool = True) -> Memory:
    """What ``layout`` needs for ``job``.

    Args:
        job: What is trained.
        layout: How.
        cuda: CUDA's kernels; False for those of a CPU.

    Raises:
        ConfigError: The model asks for a backend that is not planned for.
    """
    held = held_parts(job, layout)
    grads = GRADIENTS, _gradient_bytes(job, layout)
    # DDP's buckets stay from step to step
    resident = dict([grads]) if layout.kind == "ddp" else {}
    step = step_peak(job, layout, cuda=cuda)
    backward = _added(held, resident, step)
    update = _added(held, dict([grads]), {UPDATE: _update_bytes(job, layout, cuda)})
    moments = {"backward": backward, "optimizer": update}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    found = moments[moment]
    return Memory({part: found[part] for part in PARTS if found.get(part)}, moment)


def held_parts(job: Job, layout: Layout) -> dict[str, int]:
    """Bytes that stay from step to step: weights, moments, averaged weights."""
    return dict(_held_parts(job, layout.kind, layout.shard, layout.experts))


@lru_cache(maxsize=4096)
def _held_parts(job: Job, kind: str, shard: int, experts: int) -> tuple[tuple[str, int], ...]:
    layout, every = Layout(shard, kind, shard, experts), job.parameters
    muon = [each for each in every if job.optimizer == "muon" and is_muon(each)]
    once = sum(local_elements(each, layout) for each in every if each.trained)
    parts = {
        WEIGHTS: FLOAT32 * sum(local_elements(each, layout) for each in every),
        MOMENTS: FLOAT32 * (2 * once - sum(local_elements(each, layout) for each in muon)),
    }
    if job.ema:
        parts[AVERAGE] = FLOAT32 * once
    return tuple(parts.items())


def local_elements(parameter: Parameter, layout: Layout) -> int:
    """Elements of a parameter that a GPU stores, the largest and padded part if it is sharded."""
    if layout.experts > 1 and parameter.expert:
        return parameter.n // layout.experts
    return parameter.chunk(layout.shard) if layout.kind == "fsdp" else parameter.n


def least_bytes(job: Job, layout: Layout, *, counted_only: bool = False) -> int:
    """A lower bound of :func:`memory` that takes little time.

    Three moments of the step: the end of the forward pass, when what the loop and the outermost
    unit have gathered is still there; the end of the loop's backward pass, when its gradients are
    copied to be summed; the optimizer's step.

    Args:
        job: What is trained.
        layout: How.
        counted_only: Leave out activations, which take a forward pass of ghosts to find.
    """
    every = job.parameters
    held = sum(held_parts(job, layout).values())
    grads = _gradient_bytes(job, layout)
    resident = grads if layout.kind == "ddp" else 0
    forward = 0
    if not counted_only:
        forward = _forward_bytes(job, layout.experts, layout.micro_batch, layout.checkpoint_loops)
    if layout.kind != "fsdp":
        return held + max(resident + forward, grads)
    here = [each for each in every if not (layout.experts > 1 and each.expert)]
    padded = {each.name: layout.shard * each.chunk(layout.shard) for each in here}
    root = FLOAT32 * sum(padded[each.name] for each in here if each.unit == ROOT)
    loop = FLOAT32 * sum(padded[each.name] for each in here if each.unit == LOOP)
    summed = FLOAT32 * sum(
        padded[each.name] + each.n for each in here if each.unit == LOOP and each.trained
    )
    return held + max(root + loop + forward, root + summed, grads)


@lru_cache(maxsize=4096)
def _forward_bytes(job: Job, experts: int, micro_batch: int, checkpoint: bool) -> int:
    """Bytes alive after the forward pass, gathered weights left out."""
    ops = Ops(autocast=job.half, cuda=True)
    model = Model(job.cfg, job.n_layers, experts=experts)
    layout = Layout(1, "none", 1, experts, checkpoint, micro_batch)
    loss = model.loss(ops, batch_of(job, layout))
    live = ops.meter.live
    del loss
    return live


def step_peak(job: Job, layout: Layout, *, cuda: bool = True) -> dict[str, int]:
    """Bytes that forward and backward passes add at their peak, by what they are for."""
    sharded = layout.kind == "fsdp"
    # what only changes the number of copies, or of equal micro-batches, changes nothing here
    alike = replace(
        layout, gpus=layout.shard * layout.experts, micro_batches=min(2, layout.micro_batches)
    )
    return dict(_step_peak(job, alike, sharded, cuda))


@lru_cache(maxsize=4096)
def _step_peak(job: Job, layout: Layout, sharded: bool, cuda: bool) -> tuple[tuple[str, int], ...]:
    ops = Ops(autocast=job.half, cuda=cuda)
    copied = layout.kind == "ddp" and layout.micro_batches == 1
    model = Model(
        job.cfg, job.n_layers,
        shard=layout.shard if sharded else 0, experts=layout.experts, keeps_grads=not copied,
    )  # fmt: skip
    batch = batch_of(job, layout)
    for _ in range(layout.micro_batches):
        model.backward(ops, model.loss(ops, batch))
    return tuple(ops.meter.at_peak.items())


def batch_of(job: Job, layout: Layout) -> Batch:
    """One micro-batch."""
    return Batch(
        layout.micro_batch, job.context, job.max_loops, job.last_loops, layout.checkpoint_loops
    )


def activations_per_loop(job: Job) -> dict[str, float]:
    """Bytes that one loop of one token leaves behind for the backward pass.

    "kept" is all that its operations save, "checkpointed" what is left if they are computed again,
    "without gradient" what truncated back-propagation keeps of the loops before.
    """
    found = {}
    for name, checkpoint, truncated in (
        ("kept", False, False), ("checkpointed", True, False), ("without gradient", False, True),
    ):  # fmt: skip
        live = []
        for loops in (2, 3):
            ops = Ops(autocast=job.half, cuda=True)
            batch = Batch(1, job.context, loops, 1 if truncated else loops, checkpoint)
            loss = Model(job.cfg).loss(ops, batch)
            live.append(ops.meter.now[ACTIVATIONS])
            del loss
        found[name] = (live[1] - live[0]) / job.context
    return found


def is_muon(parameter: Parameter) -> bool:
    """Whether "muon" updates it by Muon; ``open_mythos.train.optimizers.optim`` has the table."""
    return ".lora." not in parameter.name and bool(_MUON.search(parameter.name))


def _gradient_bytes(job: Job, layout: Layout) -> int:
    """Of all gradients together, as the optimizer finds them."""
    trained = (each for each in job.parameters if each.trained)
    return FLOAT32 * sum(local_elements(each, layout) for each in trained)


def _update_bytes(job: Job, layout: Layout, cuda: bool) -> int:
    """What the optimizer allocates for its update, one parameter at a time."""
    every = job.parameters
    apart = [each.n // layout.experts for each in every if each.expert and layout.experts > 1]
    # gradients of experts that several groups hold are summed into new tensors
    copies = max(apart, default=0) * FLOAT32 if layout.gpus > layout.experts else 0
    if job.optimizer != "muon":
        return copies
    return max([copies, *(_muon_bytes(each, layout, cuda) for each in every if is_muon(each))])


def _muon_bytes(parameter: Parameter, layout: Layout, cuda: bool) -> int:
    """``Muon._update``: the momentum looked ahead, then matrices in half precision."""
    local = local_elements(parameter, layout)
    stack = len(parameter.shape) == 3
    whole = local if stack else parameter.n  # experts are not gathered
    maps = 2 if re.search(r"gate_up|kv_proj", parameter.name) else 1
    rows, columns = parameter.shape[-2:]
    rows, columns = (rows, columns // maps) if stack else (rows // maps, columns)
    gram = whole * min(rows, columns) // max(rows, columns)
    gathered = HALF * (local + whole) if layout.kind == "fsdp" and not stack else 0
    iterating = HALF * (2 * whole + 2 * gram)
    ending = HALF * whole + (FLOAT32 if stack else HALF) * local
    if not cuda:  # a CPU multiplies and adds nothing but equal dtypes
        ending += FLOAT32 * local
    return FLOAT32 * local + gathered + max(iterating, ending)


def _added(*parts: dict[str, int]) -> dict[str, int]:
    total: dict[str, int] = {}
    for each in parts:
        for name, n in each.items():
            total[name] = total.get(name, 0) + n
    return total
