"""Records of a trace, and that tracing has no effect on results."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from helpers import assert_same, random_ids, small_model
from torch.utils.checkpoint import checkpoint

from open_mythos import LoopTrace, OpenMythos

B, T = 3, 7


def traced(model: OpenMythos, n_loops: int | list[int], **arguments: object) -> LoopTrace:
    trace = LoopTrace(keep_states=True, keep_routing=True)
    model(random_ids(B, T), n_loops, trace=trace, **arguments)
    return trace


def test_tracing_changes_nothing(model):
    ids = random_ids(B, T)
    trace = LoopTrace(keep_states=True, keep_routing=True)
    torch.testing.assert_close(model(ids, 5, trace=trace), model(ids, 5), rtol=0, atol=0)


def test_states_and_their_norms(model):
    trace = traced(model, 5)
    assert trace.n_loops == 5
    before = torch.zeros_like(trace.states[0])
    for t in range(5):
        after = trace.states[t]
        torch.testing.assert_close(trace.state_norm[t], after.norm(dim=-1).mean(-1))
        torch.testing.assert_close(trace.delta_norm[t], (after - before).norm(dim=-1).mean(-1))
        torch.testing.assert_close(trace.halting[t], model.recurrent.halting(after).detach())
        before = after
    ids = random_ids(B, T)
    assert_same(model.logits(trace.states[4]).detach(), model(ids, 5).detach())


def test_little_is_kept_unless_asked_for(model):
    trace = LoopTrace()
    model(random_ids(B, T), 3, trace=trace)
    assert trace.n_loops == 3
    assert trace.load
    assert not any((trace.states, trace.halting, trace.scores, trace.experts))


def test_writing_twice_changes_nothing():
    """Activation checkpointing runs the forward pass a second time."""
    model, ids = small_model(), random_ids(B, T)
    once, twice = LoopTrace(), LoopTrace()
    model(ids, 4, trace=once)
    logits = checkpoint(lambda: model(ids, 4, trace=twice), use_reentrant=False)
    logits.sum().backward()
    for name in ("state_norm", "delta_norm", "load"):
        assert getattr(once, name).keys() == getattr(twice, name).keys()
        for key, value in getattr(once, name).items():
            torch.testing.assert_close(getattr(twice, name)[key], value)


def test_load_counts_each_choice(model):
    trace = traced(model, 5)
    assert set(trace.load) == {(1, t) for t in range(5)}
    for key, load in trace.load.items():
        assert load.sum() == B * T * 2
        torch.testing.assert_close(load, trace.experts[key].flatten().bincount(minlength=8).float())
    torch.testing.assert_close(trace.load_by_layer()[1], trace.load_by_loop(1).sum(0))
    assert trace.load_by_loop(1).shape == (5, 8)


def test_padding_is_not_counted(model):
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, :3] = mask[2, :6] = False
    trace = traced(model, [2, 4, 3], attention_mask=mask)
    assert [int(trace.load[1, t].sum()) for t in range(4)] == [24, 24, 2 * (7 + 1), 2 * 7]


def test_rows_that_ran(model):
    trace = traced(model, [2, 5, 3])
    assert trace.active[0] is trace.active[1] is None
    assert trace.active[2].rows.tolist() == [1, 2]
    assert trace.active[4].rows.tolist() == [1]
    assert trace.states[3].shape[0] == 1


def test_layers_of_several_blocks(attn_type):
    trace = traced(small_model(attn_type, recurrent_layers=2, prelude_layers=2), 3)
    assert set(trace.load) == {(layer, t) for layer in (2, 3) for t in range(3)}


class TestRoutingEntropy:
    @pytest.mark.parametrize(
        ("load", "entropy"), [([5.0, 5, 5, 5], 1.0), ([9.0, 0, 0, 0], 0.0), ([4.0, 4, 0, 0], 0.5)]
    )
    def test_values(self, load, entropy):
        trace = LoopTrace(load={(0, 0): torch.tensor(load)})
        assert trace.routing_entropy(0).tolist() == pytest.approx([entropy])


class TestExpertOverlap:
    def test_by_hand(self):
        trace = LoopTrace(active={0: None, 1: None})
        trace.experts[0, 0] = torch.tensor([[[0, 1], [2, 3]]])
        trace.experts[0, 1] = torch.tensor([[[1, 0], [3, 4]]])
        assert trace.expert_overlap(0).tolist() == [[1.0, 0.75], [0.75, 1.0]]

    def test_only_rows_that_ran_both_loops_count(self, model):
        """Equal to the overlap of those rows alone; without care, shapes would not even match."""
        trace = traced(model, [2, 5, 3])
        overlap = trace.expert_overlap(1)
        alone = LoopTrace(keep_routing=True)
        model(random_ids(B, T)[1:2], 5, trace=alone)
        assert overlap[4, 3] == alone.expert_overlap(1)[4, 3]
        assert overlap[4, 0] == alone.expert_overlap(1)[4, 0]
        assert overlap.shape == (5, 5)
        assert torch.equal(overlap, overlap.T)

    def test_routing_differs_between_loops(self, model):
        """Control for every test here: a model that routed alike at every loop would show ones."""
        overlap = traced(model, 4).expert_overlap(1)
        assert (overlap[~torch.eye(4, dtype=torch.bool)] < 0.99).all()


def test_a_trace_with_graphs_is_copied():
    trace = LoopTrace(keep_states=True, keep_routing=True)
    small_model().train()(random_ids(2, 4), 3, trace=trace)
    copied = deepcopy(trace)
    for name in ("scores", "states", "halting", "load", "state_norm"):
        ours, theirs = getattr(trace, name), getattr(copied, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert not any(theirs[key].requires_grad for key in theirs)
    assert any(score.requires_grad for score in trace.scores.values())
