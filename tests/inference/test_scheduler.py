"""Admission, prompt chunks, edge and ends, on an engine without a model."""

from __future__ import annotations

import pytest

from open_mythos.errors import ConfigError, EnvironmentError_, InternalError
from open_mythos.inference.pages import Layout
from open_mythos.inference.places import Places
from open_mythos.inference.request import Outcome
from open_mythos.inference.scheduler import chunk_positions
from open_mythos.inference.sequence import Phase
from tests.inference.simulated import END, LAYOUT, Engine, request, scheduler, served

LEVELS = LAYOUT.levels(4)


def test_a_request_as_long_as_the_context_is_served_and_one_longer_refused():
    engine = Engine(scheduler(context=20))
    engine.scheduler.add(request("a", range(10), 10))
    with pytest.raises(ConfigError, match="context"):
        engine.scheduler.add(request("b", range(10), 11))
    assert set(engine.run().outcomes) == {"a"}


@pytest.mark.parametrize("overcommit", [False, True])
def test_a_request_that_fills_the_pool_is_served_and_one_larger_refused(overcommit):
    """20 + 13 - 1 positions: the last token is never written."""
    engine = Engine(scheduler(n_pages=8 * LEVELS, overcommit=overcommit))
    engine.scheduler.add(request("a", range(20), 13, ends=()))
    with pytest.raises(ConfigError, match="pages"):
        engine.scheduler.add(request("b", range(20), 14))
    assert engine.run().outcomes == {"a": Outcome.LENGTH}
    assert len(engine.texts["a"][0]) == 13


def test_ids_are_unique_while_they_live():
    engine = Engine(scheduler())
    engine.scheduler.add(request("a"))
    with pytest.raises(ConfigError, match="id"):
        engine.scheduler.add(request("a"))
    engine.run()
    engine.scheduler.add(request("a"))


def test_the_queue_has_an_end():
    plan = scheduler(n_slots=1, max_queued=2)
    plan.add(request("a"))
    plan.add(request("b"))
    with pytest.raises(EnvironmentError_, match="full"):
        plan.add(request("c"))
    plan.plan(0)
    plan.add(request("c"))


@pytest.mark.parametrize(
    "option",
    [
        {"n_slots": 0}, {"n_pages": 0}, {"context": 0}, {"ticks_per_chunk": 0},
        {"edge_fraction": 1.5}, {"chunk_loop_tokens": 0}, {"max_queued": 0},
    ],
)  # fmt: skip
def test_options_are_checked(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        scheduler(**option)


def test_first_come_first_served():
    engine = Engine(scheduler(n_slots=2))
    for i in range(6):
        engine.scheduler.add(request(str(i), key=i))
    admitted = []
    while engine.scheduler.busy:
        admitted += [each.request.id for each in engine.step().admitted]
    assert admitted == list("012345")


def passed(small: int) -> list[str]:
    """Order of admission: one runs, a large one that needs the whole pool waits, small ones."""
    engine = Engine(scheduler(n_slots=3, n_pages=40 * LEVELS))
    engine.scheduler.add(request("first", [1], 100, ends=()))
    engine.scheduler.add(request("large", [2], 160, ends=()))
    for i in range(small):
        engine.scheduler.add(request(str(i), [3], 2, ends=(), key=i))
    admitted = []
    while engine.scheduler.busy:
        admitted += [each.request.id for each in engine.step().admitted]
    return admitted


def test_a_large_request_is_passed_by_eight_at_most():
    assert passed(8) == ["first", *"01234567", "large"]
    assert passed(12) == ["first", *"01234567", "large", "8", "9", "10", "11"]


def test_an_admitted_request_has_all_its_pages():
    plan = scheduler()
    sequence = plan.add(request("a", range(30), 11))
    assert plan.plan(0).admitted == [sequence]
    assert [len(row) for row in sequence.pages] == [10] * LEVELS
    assert sequence.slot == 0
    assert len({page for row in sequence.pages for page in row}) == 10 * LEVELS


@pytest.mark.parametrize(
    ("loops", "positions"),
    [(0, 512), (1, 512), (4, 512), (5, 256), (8, 256), (16, 128), (17, 64), (128, 16), (999, 16)],
)
def test_chunk_lengths(loops, positions):
    assert chunk_positions(loops, 2048) == positions


def test_prompts_are_cut_at_multiples_of_the_chunk():
    engine, cuts = Engine(scheduler()), []
    engine.scheduler.add(request("a", range(40)))
    while engine.scheduler.busy:
        if chunk := engine.step().chunk:
            cuts.append((chunk.start, chunk.stop, chunk.last))
    assert cuts == [(0, 16, False), (16, 32, False), (32, 40, True)]


def test_a_begun_prompt_is_finished_first():
    engine, order = Engine(scheduler(n_slots=8)), []
    for i in range(4):
        engine.scheduler.add(request(str(i), [i] * 50))
    while engine.scheduler.busy:
        if chunk := engine.step().chunk:
            order.append(chunk.sequence.request.id)
    assert order == sorted(order)
    assert len(order) == 16


def test_a_begun_prompt_comes_before_an_older_one():
    """One that was passed by, and admitted later."""
    engine = Engine(scheduler(n_slots=3, n_pages=40 * LEVELS))
    engine.scheduler.add(request("first", [1], 60, ends=()))
    engine.scheduler.add(request("large", [2], 104, ends=()))
    engine.scheduler.add(request("small", [3] * 50, 2, ends=()))
    chunks: list[str] = []
    while engine.scheduler.busy:
        if chunk := engine.step().chunk:
            chunks.append(chunk.sequence.request.id)
            if chunks == ["first", "small"]:
                engine.scheduler.cancel("first")
    assert chunks == ["first", "small", "small", "small", "small", "large"]


@pytest.mark.parametrize("ticks", [1, 2, 4])
def test_loops_run_between_chunks(ticks):
    """While something loops, two chunks are at least ``ticks_per_chunk`` ticks apart."""
    engine = Engine(scheduler(ticks_per_chunk=ticks))
    engine.scheduler.add(request("a", [1], 60, ends=()))
    engine.step()
    engine.scheduler.add(request("b", range(90), 2))
    engine.run()
    gaps = {b - a for a, b in zip(engine.chunk_ticks, engine.chunk_ticks[1:], strict=False)}
    assert gaps == {ticks}


def test_without_loops_running_every_tick_has_a_chunk():
    engine = Engine(scheduler(ticks_per_chunk=4))
    engine.scheduler.add(request("a", range(90)))
    engine.run()
    assert engine.chunk_ticks == [1, 2, 3, 4, 5, 6]


def looping(n: int, **options) -> Engine:
    """An engine with ``n`` sequences that loop."""
    engine = Engine(scheduler(n_slots=n, ticks_per_chunk=1, **options))
    for i in range(n):
        engine.scheduler.add(request(str(i), max_tokens=9, ends=()))
        plan = engine.scheduler.plan(0)
        assert plan.chunk
        engine.scheduler.prefilled(plan.chunk)
        assert engine.scheduler.entered(plan.chunk.sequence, 5, 4) is None
    return engine


@pytest.mark.parametrize(("fraction", "enough"), [(0, 1), (0.125, 1), (0.5, 4), (0.51, 5), (1, 8)])
def test_width_of_the_edge(fraction, enough):
    plan = looping(8, edge_fraction=fraction).scheduler
    for n in range(1, 9):
        plan.stopped(plan.looping()[-1:])
        assert len(plan.edge()) == (n if n >= enough else 0)


def test_rows_of_equal_depth_fall_into_step():
    """Started at different ticks, they end up in edges of all rows."""
    plan, depth, n = looping(8).scheduler, 5, 8
    done = {each.serial: each.serial % depth for each in plan.looping()}  # loops so far
    widths = []
    for _ in range(12 * depth):
        for each in (rows := plan.edge()):
            plan.left(each, 5, depth)
            done[each.serial] = 0
        widths += [len(rows)] if rows else []
        for each in plan.looping():
            done[each.serial] += 1
        plan.stopped([each for each in plan.looping() if done[each.serial] == depth])
        plan.plan(0)
        if len(widths) == 4:
            break
    assert widths[0] < n
    assert widths[-2:] == [n, n]


def test_the_edge_runs_when_nobody_loops():
    """Sequences in their prompts do not count."""
    engine = looping(1, edge_fraction=1)
    engine.scheduler.stopped(engine.scheduler.looping())
    assert len(engine.scheduler.edge()) == 1


def test_the_edge_takes_those_that_waited_longest_first():
    plan = looping(4).scheduler
    a, b, c, d = plan.looping()
    plan.stopped([c])
    plan.plan(1)
    plan.stopped([b, d])
    plan.plan(2)
    plan.stopped([a])
    assert plan.edge() == [c, b, d, a]


def test_ends():
    plan = looping(3).scheduler
    a, b, _ = sequences = plan.looping()
    plan.stopped(sequences)
    free = plan.pages.free
    assert plan.left(a, 7, 2) is None
    assert (a.phase, a.tokens, a.loops, a.position) == (Phase.LOOPING, [5, 7], [4, 2], 4)
    assert plan.left(b, 7, 2) is None
    for _ in range(7):
        plan.stopped([a])
        outcome = plan.left(a, 7, 2)
    assert outcome is Outcome.LENGTH
    assert (len(a.tokens), a.phase, a.pages) == (9, Phase.DONE, [])
    assert plan.pages.free == free + 3 * LEVELS
    plan.check()


def test_the_first_token_may_be_the_last():
    plan = scheduler()
    one = plan.add(request("one", max_tokens=1))
    plan.prefilled(plan.plan(0).chunk)
    assert plan.entered(one, 7, 4) is Outcome.LENGTH
    end = plan.add(request("end"))
    plan.prefilled(plan.plan(0).chunk)
    assert plan.entered(end, END, 4) is Outcome.STOP
    assert not plan.busy


def test_a_scored_prompt_without_new_tokens():
    engine = served(request("a", range(40), 0, prompt_logprobs=True))
    assert engine.outcomes == {"a": Outcome.LENGTH}
    assert engine.texts["a"] == ([], [])


def test_a_model_without_loops():
    engine = served(
        *(request(str(i), max_tokens=9, key=i, max_loops=0) for i in range(9)), layout=Layout(3)
    )
    assert len(engine.outcomes) == 9
    assert {loops for _, all_loops in engine.texts.values() for loops in all_loops} == {0}


def test_wrong_calls_are_found():
    plan = looping(2).scheduler
    a, _ = plan.looping()
    with pytest.raises(InternalError, match="should be"):
        plan.left(a, 5, 1)
    with pytest.raises(InternalError, match="should be"):
        plan.entered(a, 5, 1)
    plan.stopped([a])
    with pytest.raises(InternalError, match="should be"):
        plan.stopped([a])
    plan.fail(a, "no")
    with pytest.raises(InternalError, match="ended"):
        plan.fail(a, "no")


@pytest.mark.parametrize("ticks", range(12))
@pytest.mark.parametrize("outcome", [Outcome.CANCELLED, Outcome.STOP_STRING])
def test_cancelled_at_any_time(ticks, outcome):
    """Queued, in a prompt, looping, waiting: everything is free at the next plan."""
    engine = Engine(scheduler(n_slots=1))
    engine.scheduler.add(request("first", max_tokens=2, ends=()))
    engine.scheduler.add(request("a", range(40), 99, ends=()))
    for _ in range(ticks):
        engine.step()
    engine.scheduler.cancel("a", outcome)
    engine.scheduler.cancel("a", Outcome.FAILED)
    engine.scheduler.cancel("unknown")
    engine.step()
    assert engine.outcomes["a"] is outcome
    engine.run()
    counts = engine.scheduler.counts()
    assert counts["pages_held"] == counts["slots_used"] == counts["live"] == 0
    assert (counts["finished"], counts["cancelled"]) == (
        (1, 1) if outcome is Outcome.CANCELLED else (2, 0)
    )


def test_a_mark_does_not_reach_the_next_of_that_name():
    plan = looping(1).scheduler
    (a,) = plan.looping()
    plan.cancel("0")
    plan.fail(a, "first")
    plan.add(request("0"))
    assert plan.plan(1).ended == []


def test_deadlines():
    """Of the running, the queued, and of a name that is used again."""
    engine = Engine(scheduler(n_slots=1))
    engine.scheduler.add(request("runs", max_tokens=200, ends=(), deadline=20.0))
    engine.scheduler.add(request("waits", deadline=10.0))
    engine.scheduler.add(request("again", deadline=15.0))
    engine.scheduler.cancel("again")
    engine.step()
    assert engine.outcomes.pop("again") is Outcome.CANCELLED
    engine.scheduler.add(request("again", deadline=30.0))
    seen = {}
    while engine.scheduler.busy:
        engine.step()
        for id in engine.outcomes.keys() - seen.keys():
            seen[id] = engine.now, engine.outcomes[id]
    assert seen.pop("waits") == (10.0, Outcome.TIMEOUT)
    assert seen.pop("runs") == (20.0, Outcome.TIMEOUT)
    assert seen["again"][1] in (Outcome.STOP, Outcome.LENGTH)


def test_leaked_pages_are_found(monkeypatch):
    """The ledger sees a slot that is freed without its pages."""
    engine = looping(2)

    def forgetful(self, sequence):
        self.slots[sequence.slot] = None

    engine.scheduler.check()
    monkeypatch.setattr(Places, "clear", forgetful)
    engine.scheduler.cancel("0")
    engine.scheduler.plan(0)
    with pytest.raises(InternalError, match="counted"):
        engine.scheduler.check()


def test_lost_requests_are_found():
    plan = looping(2).scheduler
    a, b = plan.looping()
    plan.places.slots[0] = b
    with pytest.raises(InternalError, match="places"):
        plan.check()
    plan.places.slots[0] = a
    plan.check()
    del plan._live["0"]
    with pytest.raises(InternalError, match="admitted"):
        plan.check()
