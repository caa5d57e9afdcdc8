"""Routing metrics against manual counts and hand-made traces."""

import json
import math
from dataclasses import asdict

import pytest
import torch

from open_mythos.data.batch import Batch
from open_mythos.errors import ConfigError, DataError
from open_mythos.evaluation import LayerRouting, expert_routing, routing_by_layer
from open_mythos.model.dense import DenseTransformer
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.trace import LoopTrace

from .small import BATCHES, busy, config

N_EXPERTS, CHOSEN, LOOPS = 8, 2, 3


def measure(*loops: list[list[int]]) -> LayerRouting:
    """Measure a trace in which token i of one row chose experts ``loop[i]`` at each loop."""
    trace = LoopTrace(keep_routing=True)
    for t, chosen in enumerate(loops):
        experts = torch.tensor([chosen])
        load = torch.bincount(experts.flatten(), minlength=N_EXPERTS).float()
        trace.record_routing(3, t, load, torch.zeros(1, len(chosen), N_EXPERTS), experts)
        trace.active[t] = None
    (found,) = routing_by_layer(trace)
    return found


def by_hand(model: OpenMythos, batches: list[Batch], layer: int) -> list[list[set[int]]]:
    """Loop -> token -> the experts it chose."""
    chosen: list[list[set[int]]] = [[] for _ in range(LOOPS)]
    for batch in batches:
        trace = LoopTrace(keep_routing=True)
        model(batch.input_ids, n_loops=LOOPS, document_ids=batch.document_ids, trace=trace)
        for loop in range(LOOPS):
            sets = trace.experts[layer, loop].flatten(0, 1).tolist()
            chosen[loop] += [set(experts) for experts in sets]
    return chosen


@pytest.fixture(scope="module")
def model() -> OpenMythos:
    return busy(OpenMythos(config(recurrent_layers=2))).eval()


def test_metrics_match_manual_counts(model):
    layers = expert_routing(model, BATCHES, LOOPS)
    assert [routing.layer for routing in layers] == [1, 2]  # behind one prelude layer
    for routing in layers:
        chosen = by_hand(model, BATCHES, routing.layer)
        tokens = len(chosen[0])
        for loop in range(LOOPS):
            counts = [sum(e in experts for experts in chosen[loop]) for e in range(N_EXPERTS)]
            shares = [count / (CHOSEN * tokens) for count in counts]
            assert routing.load[loop] == pytest.approx(shares)
            for other in range(LOOPS):
                pairs = list(zip(chosen[loop], chosen[other], strict=True))
                common = sum(len(a & b) for a, b in pairs) / (CHOSEN * tokens)
                assert routing.overlap[loop][other] == pytest.approx(common)
                disjoint = sum(not a & b for a, b in pairs) / tokens
                assert routing.disjoint[loop][other] == pytest.approx(disjoint)
        assert 0 < routing.disjoint[0][1] < 1
        assert 0 < routing.divergence[0][1] < 1
        assert routing.divergence[1][0] == routing.divergence[0][1]


def test_one_favoured_pair_of_experts(model):
    even = expert_routing(model, BATCHES, 2)[0]
    with torch.no_grad():
        for block in model.recurrent.blocks:
            block.ffn.router_bias[:CHOSEN] += 10
    try:
        skewed = expert_routing(model, BATCHES, 2)[0]
    finally:
        with torch.no_grad():
            for block in model.recurrent.blocks:
                block.ffn.router_bias.zero_()
    assert skewed.load[0] == pytest.approx([0.5, 0.5] + [0.0] * 6)
    assert skewed.entropy[0] == pytest.approx(1 / 3)  # log 2 / log 8
    assert skewed.overlap == [[1, 1], [1, 1]]
    assert skewed.disjoint == [[0, 0], [0, 0]]
    assert even.entropy[0] > 0.5


def test_depth_defaults_to_the_configuration(model):
    assert len(expert_routing(model, BATCHES[:1])[0].load) == model.cfg.max_loop_iters


def test_result_is_json(model):
    json.dumps([asdict(routing) for routing in expert_routing(model, BATCHES, LOOPS)])


@pytest.mark.parametrize(
    "plain", [lambda: OpenMythos(config(n_experts=0)), lambda: DenseTransformer(config())]
)
def test_models_without_experts_are_rejected(plain):
    with pytest.raises(ConfigError, match=r"no experts|OpenMythos"):
        expert_routing(plain(), BATCHES)


def test_an_empty_iterable_is_rejected(model):
    with pytest.raises(DataError, match="nothing to evaluate on"):
        expert_routing(model, [])


ENTROPY = 0.75 * math.log2(4 / 3) + 0.25 * 2 - 0.5
"""Divergence of the loads (1, 0) and (1/2, 1/2), whose mean is (3/4, 1/4)."""


@pytest.mark.parametrize(
    ("loops", "overlap", "disjoint", "divergence"),
    [
        ([[[0, 1], [2, 3]], [[4, 5], [6, 7]]], 0, 1, 1),
        ([[[0, 1], [2, 3]], [[0, 1], [2, 3]]], 1, 0, 0),
        # tokens swap experts: the load stays the same, the sets are disjoint
        ([[[0, 1], [2, 3]], [[2, 3], [0, 1]]], 0, 1, 0),
        ([[[0], [0]], [[0], [1]]], 0.5, 0.5, ENTROPY),
    ],
    ids=["disjoint", "equal", "swapped", "by hand"],
)
def test_pairs_of_loops(loops, overlap, disjoint, divergence):
    found = measure(*loops)
    assert found.layer == 3
    assert found.overlap == [[1, overlap], [overlap, 1]]
    assert found.disjoint == [[0, disjoint], [disjoint, 0]]
    assert found.divergence[0][1] == pytest.approx(divergence)
    assert found.information == pytest.approx(divergence)  # equal for two loops of equal size


def test_chance_matches_independent_choices():
    generator = torch.Generator().manual_seed(0)
    loops = torch.randint(N_EXPERTS, (40, 6, 50, 1), generator=generator).tolist()
    found = [measure(*each) for each in loops]
    mean = sum(each.information for each in found) / len(found)
    assert mean == pytest.approx(found[0].chance, rel=0.15)


def test_traces_without_comparable_routing_are_rejected(model):
    with pytest.raises(ConfigError, match="no routing"):
        routing_by_layer(LoopTrace())
    trace = LoopTrace(keep_routing=True)
    model(BATCHES[1].input_ids, n_loops=[1, 3], trace=trace)
    with pytest.raises(ConfigError, match="exited early"):
        routing_by_layer(trace)
