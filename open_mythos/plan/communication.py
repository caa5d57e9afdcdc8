"""Communication volume of a layout in an optimizer step, and the time it takes.

Collective operations are counted as rings: an all-gather or reduce-scatter of S bytes over g GPUs
moves S (g - 1) / g to each of them, an all-reduce twice that. Where a group spans nodes, each node
has to receive S (n - 1) / n over the adapters of its members, while the rest goes over NVLink.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from open_mythos.plan.hardware import GPU, LINK_EFFICIENCY, NODE
from open_mythos.plan.job import Job, Layout
from open_mythos.plan.memory import FLOAT32, HALF, local_elements, padded_elements


@dataclass(frozen=True)
class Group:
    """GPUs that communicate: ``size`` of them, ``stride`` apart."""

    size: int
    stride: int = 1

    @property
    def in_node(self) -> int:
        """How many of them are in one node."""
        return min(self.size, max(1, NODE // self.stride))

    @property
    def nodes(self) -> float:
        """Over how many nodes they spread."""
        return self.size / self.in_node


@dataclass(frozen=True)
class Traffic:
    """One purpose of communication, over a whole optimizer step.

    Attributes:
        what: The purpose.
        nvlink: Bytes that a GPU receives from others of its node.
        network: Bytes that a GPU receives from other nodes.
        seconds: Time that takes, both ways at once.
    """

    what: str
    nvlink: float
    network: float
    seconds: float


def communication(job: Job, layout: Layout, gpu: GPU) -> list[Traffic]:
    """Return all traffic of an optimizer step of ``job`` in ``layout``; none for a single GPU."""
    found = []
    for what, nvlink, network in _traffic(job, layout):
        if nvlink or network:
            rates = LINK_EFFICIENCY * gpu.nvlink, LINK_EFFICIENCY * gpu.network
            seconds = max(nvlink / rates[0], network / rates[1])
            found.append(Traffic(what, nvlink, network, seconds))
    return found


def _traffic(job: Job, layout: Layout) -> Iterator[tuple[str, float, float]]:
    every = job.parameters
    trained = [each for each in every if each.trained]
    if layout.kind == "ddp":
        everyone = Group(layout.gpus)
        size = FLOAT32 * sum(each.n for each in trained)
        yield ("sum gradients (all-reduce)", *_all_reduce(size, everyone))
        return
    if layout.kind != "fsdp":
        return
    shard = Group(layout.shard)
    copies = Group(layout.gpus // layout.shard, layout.shard)
    apart = layout.experts > 1
    sharded = [each for each in every if not (apart and each.expert)]
    times = layout.micro_batches
    size = (
        times
        * FLOAT32
        * sum((1 + each.regathered) * padded_elements(each, layout) for each in sharded)
    )
    yield ("gather weights (all-gather)", *_all_gather(size, shard))
    size = times * FLOAT32 * sum(padded_elements(each, layout) for each in sharded if each.trained)
    yield ("sum gradients (reduce-scatter)", *_all_gather(size, shard))
    local = sum(local_elements(each, layout) for each in sharded if each.trained)
    yield ("sum gradients of copies (all-reduce)", *_all_reduce(times * FLOAT32 * local, copies))
    if apart:
        yield (
            "tokens to experts and back (all-to-all)",
            *_all_to_all(_token_bytes(job, layout), Group(layout.experts)),
        )
        experts = sum(local_elements(each, layout) for each in trained if each.expert)
        groups = Group(layout.gpus // layout.experts, layout.experts)
        yield ("sum gradients of experts (all-reduce)", *_all_reduce(FLOAT32 * experts, groups))
    if job.optimizer == "muon":
        size = HALF * sum(each.n for each in sharded if each.muon and not each.expert)
        yield ("gather Muon's updates (all-gather)", *_all_gather(size, shard))


def _token_bytes(job: Job, layout: Layout) -> float:
    """Return the bytes that a GPU dispatches to experts in a step, itself included, and gets back:
    rows and results in the dtype of the matmuls, and their gradients.
    """
    cfg = job.cfg
    rows = layout.micro_batch * layout.micro_batches * job.context * cfg.n_experts_per_tok
    there_and_back = 2 * (HALF if job.half else FLOAT32) * cfg.dim
    passes = 3 if layout.checkpoint_loops else 2
    return rows * cfg.recurrent_layers * job.n_loops * passes * there_and_back


def _all_gather(size: float, group: Group) -> tuple[float, float]:
    """Return bytes over NVLink and network for each GPU; a reduce-scatter moves as many."""
    received = size * (group.size - 1) / group.size
    network = size * (group.nodes - 1) / group.nodes / group.in_node
    # a ring that leaves the node does so once for all of its members there
    return (0.0 if group.in_node == 1 else received - network), network


def _all_reduce(size: float, group: Group) -> tuple[float, float]:
    nvlink, network = _all_gather(size, group)
    return 2 * nvlink, 2 * network


def _all_to_all(size: float, group: Group) -> tuple[float, float]:
    """Every member of the group gets an equal part of what a GPU sends."""
    return (
        size * (group.in_node - 1) / group.size,
        size * (group.size - group.in_node) / group.size,
    )
