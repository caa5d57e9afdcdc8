"""Communication volume of a step, against hand-computed numbers."""

from __future__ import annotations

import pytest
import torch

from open_mythos.accounting import account
from open_mythos.plan import Layout, communication, gpu
from open_mythos.plan.communication import Group, _all_gather, _all_reduce, _all_to_all
from open_mythos.plan.hardware import GPUS, LINK_EFFICIENCY
from open_mythos.plan.parameters import ROOT, parameters
from open_mythos.plan.trace import trace_step
from open_mythos.plan.tracker import StepTracker

from .small import SMALL, small_job

H100 = gpu("h100")


def by_purpose(job, layout: Layout) -> dict[str, tuple[float, float]]:
    found = communication(job, layout, H100)
    return {each.what.partition(" (")[0]: (each.nvlink, each.network) for each in found}


@pytest.mark.parametrize(
    ("group", "in_node", "nodes"),
    [
        (Group(8), 8, 1), (Group(2), 2, 1), (Group(32), 8, 4), (Group(4, 8), 1, 4),
        (Group(16, 2), 4, 4), (Group(4, 2), 4, 1), (Group(2, 64), 1, 2),
    ],
)  # fmt: skip
def test_groups(group: Group, in_node: int, nodes: int) -> None:
    assert (group.in_node, group.nodes) == (in_node, nodes)


def test_ring_collectives() -> None:
    assert _all_gather(800, Group(8)) == (700, 0)
    assert _all_reduce(800, Group(8)) == (1400, 0)
    assert _all_gather(800, Group(4, 8)) == (0, 600)
    # two nodes: each receives the other's half over eight adapters, the rest over NVLink
    assert _all_gather(1600, Group(16)) == (1400, 100)
    assert _all_to_all(800, Group(8)) == (700, 0)
    assert _all_to_all(1600, Group(16)) == (700, 800)
    assert _all_gather(800, Group(1)) == (0, 0)


def test_ddp_reduces_all_gradients_once_per_step() -> None:
    assert communication(small_job(), Layout(1, "none"), H100) == []
    trained = account(SMALL).parameters - SMALL.dim - 1
    for micro_batches in (1, 4):
        found = by_purpose(small_job(), Layout(8, "ddp", micro_batches=micro_batches))
        assert found == {"sum gradients": (2 * 4 * trained * 7 / 8, 0)}


def test_fsdp_gathers_the_loop_once_and_blocks_twice() -> None:
    layout = Layout(8, "fsdp", 8, micro_batches=3)
    found = by_purpose(small_job(), layout)
    padded = {
        unit: sum(8 * each.chunk(8) for each in parameters(SMALL) if each.unit == unit)
        for unit in (ROOT, "recurrent", "prelude.0", "coda.0")
    }
    elements = padded[ROOT] + padded["recurrent"] + 2 * (padded["prelude.0"] + padded["coda.0"])
    assert found["gather weights"] == (3 * 4 * elements * 7 / 8, 0)
    # a hidden width of 85 gives matrices of 170 rows, which eight processes pad to 176
    prelude = sum(each.n for each in parameters(SMALL) if each.unit == "prelude.0")
    assert padded["prelude.0"] == prelude + 6 * SMALL.dim
    gate = 8 * (SMALL.dim + 1)  # one row each: padded, and not trained
    assert found["sum gradients"] == (3 * 4 * (sum(padded.values()) - gate) * 7 / 8, 0)


def test_traffic_depends_on_the_loops_only_with_expert_parallelism() -> None:
    """The loop's weights are gathered once for all loops; tokens are dispatched in each."""
    whole, apart = Layout(8, "fsdp", 8), Layout(8, "fsdp", 8, 4)
    assert by_purpose(small_job(1), whole) == by_purpose(small_job(4), whole)
    once, four = (by_purpose(small_job(n), apart) for n in (1, 4))
    tokens = "tokens to experts and back"
    assert four[tokens][0] == 4 * once[tokens][0]
    rows, width = 32 * SMALL.n_experts_per_tok, SMALL.dim
    there_and_back = 2 + 2  # bfloat16 rows and results
    assert once[tokens] == (rows * width * there_and_back * 2 * 3 / 4, 0)
    recomputed = by_purpose(small_job(1), Layout(8, "fsdp", 8, 4, checkpoint_loops=True))
    assert recomputed[tokens][0] == 1.5 * once[tokens][0]
    for name in once.keys() - {tokens}:
        assert four[name] == once[name]


def test_hybrid_sharding_keeps_gathering_in_the_node() -> None:
    found = by_purpose(small_job(), Layout(32, "fsdp", 8))
    assert found["gather weights"][1] == found["sum gradients"][1] == 0
    nvlink, network = found["sum gradients of copies"]
    local = sum(each.chunk(8) for each in parameters(SMALL) if each.trained)
    assert (nvlink, network) == (0, 2 * 4 * local * 3 / 4)
    assert by_purpose(small_job(), Layout(32, "fsdp", 32))["gather weights"][1] > 0


def test_muon_gathers_matrices_but_not_experts() -> None:
    layout = Layout(8, "fsdp", 8)
    extra = by_purpose(small_job(optimizer="muon"), layout)["gather Muon's updates"]
    assert "gather Muon's updates" not in by_purpose(small_job(), layout)
    assert 0 < extra[0] < 2 * account(SMALL).parameters


@pytest.mark.parametrize("name", GPUS)
def test_the_slower_link_determines_the_time(name: str) -> None:
    for each in communication(small_job(), Layout(64, "fsdp", 64, 8), gpu(name)):
        slower = max(each.nvlink / gpu(name).nvlink, each.network / gpu(name).network)
        assert each.seconds == pytest.approx(slower / LINK_EFFICIENCY)
        assert each.seconds > 0


@pytest.fixture
def collectives(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Name of a collective -> bytes of its larger side, over all calls of a dry run."""
    found: dict[str, int] = {}
    plain = StepTracker._mark_collective

    def count(self, func, args, kwargs):
        name = func._schema.name.removeprefix("c10d::").strip("_")
        tensors = [each for each in torch.utils._pytree.tree_leaves((args, kwargs))
                   if isinstance(each, torch.Tensor)]  # fmt: skip
        if func.namespace == "c10d" and self.phase is not None:
            found[name] = found.get(name, 0) + max(each.nbytes for each in tensors)
        plain(self, func, args, kwargs)

    monkeypatch.setattr(StepTracker, "_mark_collective", count)
    return found


@pytest.mark.parametrize("checkpoint", [False, True])
def test_formulas_match_a_traced_step(collectives: dict[str, int], checkpoint: bool) -> None:
    job, layout = small_job(2), Layout(8, "fsdp", 8, 4, checkpoint, micro_batches=2)
    trace_step(job, layout)
    counted = by_purpose(job, layout)
    assert counted["gather weights"][0] == pytest.approx(collectives["allgather_base"] * 7 / 8)
    assert counted["sum gradients"][0] == pytest.approx(collectives["reduce_scatter_base"] * 7 / 8)
    # every loop also sends the number of rows for each of eight experts
    sizes = 2 * 2 * (1 + checkpoint) * 8 * 8
    sent = collectives["alltoall_base"] - sizes
    assert counted["tokens to experts and back"][0] == pytest.approx(sent * 3 / 4)
