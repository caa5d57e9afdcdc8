"""Communication volume and time of an optimizer step.

Collectives are modeled as rings: an all-gather or reduce-scatter of S bytes over g GPUs moves
S (g - 1) / g to each GPU, an all-reduce twice that. If a group spans n nodes, each node receives
S (n - 1) / n over the network adapters of its members; the rest goes over NVLink.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from open_mythos.checks import checked
from open_mythos.plan.hardware import GPU, LINK_EFFICIENCY, NODE
from open_mythos.plan.job import Job, Layout
from open_mythos.plan.memory import FLOAT32, HALF, local_elements, padded_elements


@dataclass(frozen=True)
class Group:
    """A process group of ``size`` GPUs, ``stride`` ranks apart."""

    size: int
    stride: int = 1

    @property
    def in_node(self) -> int:
        """Members per node."""
        return min(self.size, max(1, NODE // self.stride))

    @property
    def nodes(self) -> float:
        """Number of nodes that the group spans."""
        return self.size / self.in_node


@dataclass(frozen=True)
class Traffic:
    """Communication of one kind during an optimizer step.

    Attributes:
        what: Purpose and collective.
        nvlink: Bytes received per GPU from the same node.
        network: Bytes received per GPU from other nodes.
        seconds: Time on the slower of the two links.
    """

    what: str
    nvlink: float
    network: float
    seconds: float


@checked
def communication(job: Job, layout: Layout, gpu: GPU) -> list[Traffic]:
    """Return the traffic of an optimizer step of ``job`` in ``layout``; empty for a single GPU."""
    found = []
    for what, nvlink, network in _traffic(job, layout):
        if nvlink or network:
            seconds = max(nvlink / gpu.nvlink, network / gpu.network) / LINK_EFFICIENCY
            found.append(Traffic(what, nvlink, network, seconds))
    return found


def _traffic(job: Job, layout: Layout) -> Iterator[tuple[str, float, float]]:
    trained = [each for each in job.parameters if each.trained]
    if layout.kind == "ddp":
        size = FLOAT32 * sum(each.n for each in trained)
        yield ("sum gradients (all-reduce)", *_all_reduce(size, Group(layout.gpus)))
    if layout.kind != "fsdp":
        return
    shard = Group(layout.shard)
    copies = Group(layout.gpus // layout.shard, layout.shard)
    sharded = [each for each in job.parameters if not (layout.experts > 1 and each.expert)]
    each_pass = FLOAT32 * layout.micro_batches
    gathered = sum((1 + each.regathered) * padded_elements(each, layout) for each in sharded)
    yield ("gather weights (all-gather)", *_all_gather(each_pass * gathered, shard))
    summed = sum(padded_elements(each, layout) for each in sharded if each.trained)
    yield ("sum gradients (reduce-scatter)", *_all_gather(each_pass * summed, shard))
    local = sum(local_elements(each, layout) for each in sharded if each.trained)
    yield ("sum gradients of copies (all-reduce)", *_all_reduce(each_pass * local, copies))
    if layout.experts > 1:
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
    """Return the bytes that a GPU dispatches to experts per step, its own share included: inputs
    and outputs in the dtype of the matmuls, and their gradients.
    """
    cfg = job.cfg
    rows = layout.micro_batch * layout.micro_batches * job.context * cfg.n_experts_per_tok
    there_and_back = 2 * (FLOAT32 if job.dtype == "float32" else HALF) * cfg.dim
    passes = 3 if layout.checkpoint_loops else 2
    return rows * cfg.recurrent_layers * job.n_loops * passes * there_and_back


def _all_gather(size: float, group: Group) -> tuple[float, float]:
    """Return bytes per GPU over NVLink and network; the same for a reduce-scatter."""
    received = size * (group.size - 1) / group.size
    network = size * (group.nodes - 1) / group.nodes / group.in_node
    # a ring leaves the node once for all of its members there
    return (0.0 if group.in_node == 1 else received - network), network


def _all_reduce(size: float, group: Group) -> tuple[float, float]:
    nvlink, network = _all_gather(size, group)
    return 2 * nvlink, 2 * network


def _all_to_all(size: float, group: Group) -> tuple[float, float]:
    near, far = group.in_node - 1, group.size - group.in_node
    return size * near / group.size, size * far / group.size
