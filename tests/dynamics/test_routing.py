"""Routing made by hand, and the routing of a model against other code that counts it."""

from __future__ import annotations

import pytest
import torch
from helpers import random_ids

from open_mythos import LoopTrace
from open_mythos.data import Batch
from open_mythos.dynamics import routing_divergence, run_trajectory
from open_mythos.errors import ConfigError
from open_mythos.evaluation import expert_routing

EXPERTS = 8


def trace_of(*loops: list[list[int]]) -> LoopTrace:
    """A trace in which token i of one row chose ``loop[i]`` at each loop."""
    trace = LoopTrace(keep_routing=True)
    for t, chosen in enumerate(loops):
        experts = torch.tensor([chosen])
        load = torch.bincount(experts.flatten(), minlength=EXPERTS).float()
        trace.record_routing(3, t, load, torch.zeros(1, len(chosen), EXPERTS), experts)
        trace.active[t] = None
    return trace


def test_loops_without_a_common_expert():
    (found,) = routing_divergence(trace_of([[0, 1], [2, 3]], [[4, 5], [6, 7]]))
    assert found.layer == 3
    assert found.divergence_LL.tolist() == [[0, 1], [1, 0]]
    assert found.disjoint_LL.tolist() == [[0, 1], [1, 0]]
    assert found.overlap_LL.tolist() == [[1, 0], [0, 1]]
    assert found.information == pytest.approx(1)  # the expert tells the loop


def test_loops_that_are_equal():
    (found,) = routing_divergence(trace_of(*[[[0, 1], [2, 3], [0, 5]]] * 3))
    assert not found.divergence_LL.any()
    assert not found.disjoint_LL.any()
    assert (found.overlap_LL == 1).all()
    assert found.information == 0


def test_tokens_that_swap_experts_leave_the_load_as_it_was():
    """What the divergence of loads cannot see, the share of disjoint sets does."""
    (found,) = routing_divergence(trace_of([[0, 1], [2, 3]], [[2, 3], [0, 1]]))
    assert not found.divergence_LL.any()
    assert found.disjoint_LL.tolist() == [[0, 1], [1, 0]]
    assert found.information == 0


def test_a_divergence_computed_by_hand():
    """Loads (1, 0) and (1/2, 1/2): mean (3/4, 1/4)."""
    (found,) = routing_divergence(trace_of([[0], [0]], [[0], [1]]))
    entropy_of_mean = 0.75 * torch.log2(torch.tensor(4 / 3)) + 0.25 * 2
    assert found.divergence_LL[0, 1].item() == pytest.approx(float(entropy_of_mean) - 0.5)
    assert found.disjoint_LL[0, 1].item() == 0.5
    assert found.information == pytest.approx(float(entropy_of_mean) - 0.5)


def test_chance_is_what_independent_choices_show():
    generator = torch.Generator().manual_seed(0)
    loops = torch.randint(EXPERTS, (40, 6, 50, 1), generator=generator).tolist()
    found = [routing_divergence(trace_of(*each))[0] for each in loops]
    mean = sum(each.information for each in found) / len(found)
    assert mean == pytest.approx(found[0].chance, rel=0.15)


def test_equal_to_the_evaluation(shared_model):
    model, ids = shared_model("mla"), random_ids(3, 12)
    trace = LoopTrace(keep_routing=True)
    run_trajectory(model, ids, 4, trace=trace)
    (found,) = routing_divergence(trace)
    (reference,) = expert_routing(model, [Batch(ids, ids, None, torch.arange(3))], 4)
    assert found.layer == reference.layer
    assert found.overlap_LL.tolist() == reference.overlap
    consecutive = found.disjoint_LL.diagonal(1).tolist()
    assert consecutive == pytest.approx(reference.disjoint)
    assert 0 < found.divergence_LL[0, 1] < 1
    assert torch.equal(found.divergence_LL, found.divergence_LL.T)


def test_traces_without_routing_are_refused(shared_model):
    with pytest.raises(ConfigError, match="no routing"):
        routing_divergence(LoopTrace())
    trace = LoopTrace(keep_routing=True)
    shared_model("gqa")(random_ids(2, 4), n_loops=[1, 3], trace=trace)
    with pytest.raises(ConfigError, match="left early"):
        routing_divergence(trace)
