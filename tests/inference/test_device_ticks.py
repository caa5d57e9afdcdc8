"""Ticks of constant shape choose what ``generate`` chooses, and read no value on the host."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from helpers import random_ids, small_model

from open_mythos import DenseTransformer
from open_mythos.errors import InternalError
from open_mythos.inference.batch import Needs, few_sizes
from open_mythos.inference.oracle import alone, play, random_request, small_engine, together
from open_mythos.inference.request import Outcome, Request
from open_mythos.model.causal_lm import CausalLM
from tests.inference.no_syncs import Tapes, no_waiting

CONTEXT = 96


def requests(model: CausalLM, n: int, seed: int = 1, **changes: object) -> list[Request]:
    draw = Random(seed)
    return [replace(random_request(draw, str(i), model), **changes) for i in range(n)]


def assert_as_generate(model: CausalLM, done: dict, given: list[Request]) -> None:
    for each in given:
        plain, mine = alone(model, each), done[each.id]
        assert (mine.tokens, mine.loops, mine.outcome) == (plain.tokens, plain.loops, plain.outcome)
        if each.logprobs is not None:
            assert mine.logprobs == pytest.approx(plain.logprobs, abs=1e-3)
            assert [len(top) for top in mine.top] == [len(top) for top in plain.top]


@pytest.mark.parametrize(
    ("attn_type", "changes"),
    [("mla", {}), ("gqa", {"n_experts": 0, "recurrent_layers": 2}), ("gqa", {"kv_share": "last"})],
    ids=str,
)
def test_tokens(attn_type, changes):
    model = small_model(attn_type, max_seq_len=CONTEXT, **changes)
    given = requests(model, 12)
    done = together(small_engine(model, slots=5, exact=False, constant_shapes=True), given)
    assert_as_generate(model, done, given)


def test_dense_models(attn_type):
    model = DenseTransformer(small_model(attn_type, max_seq_len=CONTEXT).cfg).eval()
    given = requests(model, 6)
    done = together(small_engine(model, slots=3, exact=False, constant_shapes=True), given)
    assert_as_generate(model, done, given)


def test_a_token_at_every_tick():
    """A row that leaves after one loop is two positions ahead of what the host has read."""
    model = small_model("mla", n_experts=0, max_seq_len=CONTEXT)
    one_loop = {"max_loops": 1, "min_loops": 1, "rule": "none", "numbers": ()}
    given = requests(model, 2, **one_loop, max_tokens=30, ends=())
    done = together(small_engine(model, slots=1, exact=False, constant_shapes=True), given)
    assert_as_generate(model, done, given)


def test_replayed_ticks():
    """What a graph holds: a tick of equal needs and pages runs in Python but twice."""
    model = small_model("gqa", n_experts=0, max_seq_len=CONTEXT)
    engine, tapes = small_engine(model, slots=4, exact=False, constant_shapes=True), Tapes()
    assert engine._ticks is not None
    engine._ticks._graphs = tapes
    same = {"rule": "gate", "numbers": (0.7,), "min_loops": 1, "logprobs": 2, "logit_bias": ()}
    plain = {"temperature": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    given = requests(model, 16, **same, **plain, repetition_penalty=1.1, max_tokens=12, ends=())
    done = together(engine, given)
    assert_as_generate(model, done, given)
    assert tapes.replays > 3 * len(tapes.tapes)


def test_cancelled_and_swapped_sequences():
    """A token in flight never reaches the next sequence of a slot, and none is lost in a swap."""
    model = small_model("mla", n_experts=0, max_seq_len=CONTEXT)
    given = requests(model, 10, seed=3, max_tokens=9, ends=())
    engine = small_engine(model, given, slots=3, exact=False, constant_shapes=True, overcommit=True)
    cancels = {4: ["0"], 9: ["2"], 14: ["5"]}
    preempts = {tick: [str(tick % 10)] for tick in range(3, 60, 4)}
    done = play(engine, {0: given}, cancels, preempts)
    kept = [each for each in given if done[each.id].outcome is not Outcome.CANCELLED]
    assert len(kept) >= 7
    assert_as_generate(model, done, kept)
    assert engine.stats()["preemptions"] > 0


def test_control_a_late_token_of_another_sequence(monkeypatch):
    """Without serial numbers, tokens of cancelled requests go astray."""
    model = small_model("mla", n_experts=0, max_seq_len=CONTEXT)
    given = requests(model, 10, seed=3, max_tokens=9, ends=())
    engine = small_engine(model, given, slots=2, exact=False, constant_shapes=True)
    ticks = engine._ticks
    assert ticks is not None
    read = type(ticks.launch(Needs.of([]), 1)).read

    def by_slot(launched):
        running = [s.serial for s in engine.scheduler.places.running()]
        return [(running[serial % len(running)], chosen)
                for serial, chosen in read(launched) if running]  # fmt: skip

    monkeypatch.setattr("open_mythos.inference.device_ticks.Launched.read", by_slot)
    try:
        done = play(engine, {0: given}, {tick: [str(tick // 3)] for tick in range(2, 20, 3)})
    except InternalError:
        return
    kept = [each for each in given if done[each.id].outcome is not Outcome.CANCELLED]
    with pytest.raises(AssertionError):
        assert_as_generate(model, done, kept)


@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_tick_reads_no_value(attn_type, logprobs, monkeypatch):
    model = small_model(attn_type, n_experts=0, max_seq_len=CONTEXT)
    engine = small_engine(model, slots=4, exact=False, constant_shapes=True)
    rules = (("gate", (0.7,)), ("change", (0.3,)), ("acceleration", (0.6, 1.0)), ("none", ()))
    given = [
        Request(str(i), tuple(random_ids(1, 4 + i)[0].tolist()), 20, top_k=9, top_p=0.9, min_p=0.01,
                temperature=0.5 * i, repetition_penalty=1.2, presence_penalty=0.1, max_loops=4,
                rule=rule, numbers=numbers, logprobs=logprobs, logit_bias=((3, 1.0),))
        for i, (rule, numbers) in enumerate(rules)
    ]  # fmt: skip
    for each in given:
        engine.add(each)
    while sum(bool(s.tokens) for s in engine.scheduler.places.running()) < 4:
        engine.step()
    assert engine._ticks is not None
    with no_waiting(monkeypatch):
        for _ in range(5):
            engine._ticks.launch(Needs.of(given), 4)


def test_sizes():
    assert [few_sizes(n) for n in (1, 2, 3, 4, 5, 7, 9, 13, 17)] == [1, 2, 3, 4, 6, 8, 12, 16, 24]
