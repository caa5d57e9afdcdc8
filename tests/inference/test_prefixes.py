"""Cached prefixes: what is taken over, by whom, and what is not."""

from __future__ import annotations

import pytest

from open_mythos.inference import scheduler as module
from open_mythos.inference.pages import Layout, unit_keys
from tests.inference.simulated import LAYOUT, Engine, request, scheduler, served

LEVELS = LAYOUT.levels(4)


@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 33, 48])
def test_a_hit_is_whole_units_and_leaves_a_token(length):
    """Chunks and units are 16 positions here, pages 4."""
    engine = served(request("cold", range(length), key=1))
    engine.scheduler.add(request("warm", range(length), key=1))
    engine.run()
    assert engine.cached == {"cold": 0, "warm": (length - 1) // 16 * 16}
    assert engine.texts["cold"] == engine.texts["warm"]


def test_units_are_no_shorter_than_pages():
    layout = Layout(1, 1, 1, page=64)
    engine = served(request("cold", range(100)), layout=layout)
    engine.scheduler.add(request("warm", range(100)))
    engine.run()
    assert engine.cached["warm"] == 64


@pytest.mark.parametrize(
    "other",
    [
        {"salt": "mine"}, {"max_loops": 5}, {"max_loops": 3},
        {"rule": "gate", "numbers": (0.5,)}, {"prompt_logprobs": True},
    ],
)  # fmt: skip
def test_what_parts_prompts(other):
    engine = served(request("cold", range(40)))
    engine.scheduler.add(request("warm", range(40), **other))
    engine.run()
    assert engine.cached["warm"] == 0


@pytest.mark.parametrize(
    ("rule", "hit"), [({"rule": "gate", "numbers": (0.5,)}, False), ({}, True)]
)
def test_fewest_loops_part_prompts_under_a_rule_only(rule, hit):
    engine = served(request("cold", range(40), **rule))
    engine.scheduler.add(request("warm", range(40), min_loops=2, **rule))
    engine.run()
    assert (engine.cached["warm"] > 0) == hit


def test_prompts_that_begin_alike():
    engine = served(request("cold", range(64)))
    engine.scheduler.add(request("warm", [*range(40), *range(24)]))
    engine.run()
    assert engine.cached["warm"] == 32


def test_generated_tokens_are_not_entered():
    engine = served(request("cold", range(10), 60, ends=()))
    prompt = [*range(10), *engine.texts["cold"][0]]
    engine.scheduler.add(request("warm", prompt))
    engine.run()
    assert engine.cached["warm"] == 0


def test_equal_prompts_that_come_together():
    """The others wait for the first, and take over what it has computed."""
    engine = served(*(request(str(i), range(40), key=i) for i in range(4)), n_slots=4)
    assert engine.cached == {"0": 0, "1": 32, "2": 32, "3": 32}
    assert engine.scheduler.counts()["pages_cached"] == 8 * LEVELS


def test_shared_pages_are_reserved_once():
    """Two prompts of ten pages in a pool of sixteen run together, thanks to their eight."""
    engine = Engine(scheduler(n_pages=16 * LEVELS))
    engine.scheduler.add(request("cold", range(33), 2))
    engine.run()
    for i in range(2):
        engine.scheduler.add(request(str(i), range(33), 8, key=i))
    assert len(engine.step().admitted) == 2
    engine.run()


def test_cached_pages_are_not_free_for_whoever_takes_them_up():
    """One page is free beside the eight that a request shares; it needs two more."""
    engine = Engine(scheduler(n_pages=16 * LEVELS))
    engine.scheduler.add(request("cold", range(33), 2))
    engine.run()
    engine.scheduler.add(request("other", [9] * 21, 8))
    engine.scheduler.add(request("warm", range(33), 8, key=1))
    assert len(engine.step().admitted) == 1
    engine.run()


def test_cached_pages_give_way():
    engine = Engine(scheduler(n_pages=12 * LEVELS))
    for i in range(5):
        engine.scheduler.add(request(str(i), [i] * 40, 4))
    engine.run()
    counts = engine.scheduler.counts()
    assert counts["pages_free"] + counts["pages_cached"] == counts["pages"]
    assert counts["pages_cached"] == 8 * LEVELS


@pytest.mark.parametrize("other", [{"salt": "mine"}, {"max_loops": 3}])
def test_a_key_without_depth_or_salt_is_found(monkeypatch, other):
    """The engine without a model sees content of another request: a control of its checks."""
    monkeypatch.setattr(module, "unit_keys", lambda facts, *rest: unit_keys((), *rest))
    with pytest.raises((AssertionError, IndexError)):
        test_what_parts_prompts(other)


def test_the_engine_without_a_model_reads_what_it_checks(monkeypatch):
    """Units that all have one key: a hit has the wrong content."""
    monkeypatch.setattr(module, "unit_keys", lambda facts, prompt, unit: (b"a", b"b"))
    engine = served(request("cold", range(40)))
    engine.scheduler.add(request("warm", [9] * 40))
    with pytest.raises(AssertionError):
        engine.run()


def test_the_end_of_a_prefix_gives_way_first():
    """Two units of four rows are cached; a request that needs one of them leaves the first."""
    engine = Engine(scheduler(n_pages=12 * LEVELS))
    engine.scheduler.add(request("cold", range(33), 2))
    engine.run()
    engine.scheduler.add(request("other", [9], 32, ends=()))
    engine.run()
    engine.scheduler.add(request("warm", range(33), 2))
    engine.run()
    assert engine.cached["warm"] == 16
