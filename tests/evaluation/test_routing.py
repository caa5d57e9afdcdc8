"""Routing statistics against counts made by hand."""

import json
from dataclasses import asdict

import pytest
import torch

from open_mythos.data.batch import Batch
from open_mythos.errors import ConfigError, DataError
from open_mythos.evaluation import expert_routing
from open_mythos.model.dense import DenseTransformer
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.trace import LoopTrace

from .small import BATCHES, busy, config

N_EXPERTS, CHOSEN, LOOPS = 8, 2, 3


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


def test_figures_are_those_counted_by_hand(model):
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
                if other == loop + 1:
                    disjoint = sum(not a & b for a, b in pairs) / tokens
                    assert routing.disjoint[loop] == pytest.approx(disjoint)
        assert 0 < routing.disjoint[0] < 1


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
    assert skewed.disjoint == [0]
    assert even.entropy[0] > 0.5


def test_a_single_loop_has_no_successor(model):
    (routing, _) = expert_routing(model, BATCHES[:1], 1)
    assert (routing.disjoint, routing.overlap) == ([], [[1]])


def test_depth_defaults_to_that_of_the_configuration(model):
    assert len(expert_routing(model, BATCHES[:1])[0].load) == model.cfg.max_loop_iters


def test_result_is_json(model):
    json.dumps([asdict(routing) for routing in expert_routing(model, BATCHES, LOOPS)])


@pytest.mark.parametrize(
    "plain", [lambda: OpenMythos(config(n_experts=0)), lambda: DenseTransformer(config())]
)
def test_models_without_experts_are_refused(plain):
    with pytest.raises(ConfigError, match="routes nothing"):
        expert_routing(plain(), BATCHES)


def test_no_batch_is_refused(model):
    with pytest.raises(DataError, match="nothing to evaluate on"):
        expert_routing(model, [])
