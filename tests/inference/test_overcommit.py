"""Pages by need: who is taken out, who comes back, and that everybody ends."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_mythos.inference.places import MOST_PREEMPTIONS
from open_mythos.inference.request import Outcome, Request
from open_mythos.inference.sequence import Phase
from tests.inference.simulated import LAYOUT, Engine, request, scheduler, served

LEVELS = LAYOUT.levels(4)
REQUESTS = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 4, 8])),
    min_size=1,
    max_size=12,
)


def requests(sizes: list[tuple[int, int, int]]) -> list[Request]:
    """Requests of (prompt, new tokens, loops); some prompts begin alike."""
    return [
        request(str(i), [*([7] * (n - 1)), i % 3], new, key=i, max_loops=loops, ends=())
        for i, (n, new, loops) in enumerate(sizes)
    ]


def work(each: Request, engine: Engine) -> int:
    """Ticks that a request takes at most when something of it happens in every one."""
    chunks = -(-len(each.prompt) // 16)
    return chunks * engine.scheduler.ticks_per_chunk + each.max_tokens * (each.max_loops + 1)


@settings(max_examples=40)
@given(REQUESTS, st.integers(1, 5), st.integers(0, 60), st.booleans())
def test_every_request_ends(sizes, n_slots, spare, overcommit):
    """No deadlock and no starvation: in every tick some request gets on, but for the moves."""
    asked = requests(sizes)
    most = max(LAYOUT.pages(each.max_loops, len(each.prompt) + each.max_tokens) for each in asked)
    engine = Engine(scheduler(n_slots, most + spare, overcommit=overcommit))
    for each in asked:
        engine.scheduler.add(each)
    moves = 2 * MOST_PREEMPTIONS * len(asked)
    engine.run(sum(work(each, engine) for each in asked) + moves + len(asked))
    assert engine.outcomes == {each.id: Outcome.LENGTH for each in asked}
    counts = engine.scheduler.counts()
    assert counts["preemptions"] <= (MOST_PREEMPTIONS * len(asked) if overcommit else 0)
    alone = {id: text for each in asked for id, text in served(each).texts.items()}
    assert engine.texts == alone


def crowded() -> tuple[Engine, Counter[str]]:
    """Eight requests that grow from 2 to 11 rows, in a pool of 30; and who was taken out."""
    engine, out = Engine(scheduler(8, 30 * LEVELS, overcommit=True)), Counter[str]()
    for i in range(8):
        engine.scheduler.add(request(str(i), [i], 42, key=i, ends=()))
    while engine.scheduler.busy:
        done = engine.step()
        out.update(moved.sequence.request.id for moved in done.swap_out)
        engine.scheduler.check()
    return engine, out


def test_the_youngest_is_taken_out():
    engine, out = crowded()
    assert len(engine.outcomes) == 8
    assert out["0"] == 0
    assert out["7"] >= 2
    assert max(out.values()) <= MOST_PREEMPTIONS
    assert engine.scheduler.counts()["preemptions"] == out.total() >= 5


def test_more_run_together_than_with_reservations():
    """What overcommitting is for."""
    engine = Engine(scheduler(8, 30 * LEVELS))
    for i in range(8):
        engine.scheduler.add(request(str(i), [i], 42, key=i, ends=()))
    assert len(engine.step().admitted) == 2
    engine.run()
    assert crowded()[0].scheduler.tick < engine.scheduler.tick


def test_one_taken_out_comes_back_before_anyone_is_admitted():
    engine = Engine(scheduler(2, 400))
    for id in "abc":
        engine.scheduler.add(request(id, [1], 30, key=ord(id), ends=()))
    for _ in range(12):
        engine.step()
    engine.scheduler.preempt("b")
    done = engine.step()
    assert [moved.sequence.request.id for moved in done.swap_out] == ["b"]
    assert (done.swap_in, done.admitted) == ([], [])
    done = engine.step()
    assert [each.request.id for each in done.swap_in] == ["b"]
    assert done.admitted == []


def test_after_three_times_it_waits_for_all_its_pages():
    engine = Engine(scheduler(2, 400, overcommit=True))
    sequence = engine.scheduler.add(request("a", [1], 60, ends=()))
    rows = []
    for _ in range(MOST_PREEMPTIONS):
        for _ in range(10):
            engine.step()
        rows.append(len(sequence.pages[0]))
        engine.scheduler.preempt("a")
        engine.step()
        assert (sequence.phase, sequence.slot, sequence.pages) == (Phase.SWAPPED, None, [])
    engine.step()
    assert max(rows) < 15 == len(sequence.pages[0])
    engine.run()


def test_one_that_was_taken_out_often_stays():
    """The older one, which lacks pages, goes itself."""
    engine = Engine(scheduler(2, 22 * LEVELS, overcommit=True))
    old = engine.scheduler.add(request("old", [1], 60, key=1, ends=()))
    young = engine.scheduler.add(request("young", [2], 50, key=2, ends=()))
    for _ in range(MOST_PREEMPTIONS):
        while young.phase is not Phase.LOOPING:
            engine.step()
        engine.scheduler.preempt("young")
        engine.step()
    engine.run()
    assert young.preemptions == MOST_PREEMPTIONS
    assert old.preemptions >= 1
    assert set(engine.outcomes) == {"old", "young"}


def test_the_oldest_comes_back_first():
    """Whatever their slots were."""
    engine = Engine(scheduler(2))
    a, b, c = (engine.scheduler.add(request(i, [1], 60, key=ord(i), ends=())) for i in "abc")
    for _ in range(8):
        engine.step()
    engine.scheduler.cancel("a")
    for _ in range(8):
        engine.step()
    assert (a.phase, b.slot, c.slot) == (Phase.DONE, 1, 0)
    engine.scheduler.preempt("b")
    engine.scheduler.preempt("c")
    engine.step()
    assert engine.step().swap_in == [b, c]


@pytest.mark.parametrize("overcommit", [False, True])
def test_taken_out_at_any_tick(overcommit):
    """In the prompt and in the loop: the request goes on where it was."""
    asked = request("a", range(60), 8, ends=(), key=5)
    alone = served(asked)
    phases = set()
    for tick in range(1, alone.scheduler.tick):
        engine = Engine(scheduler(overcommit=overcommit))
        sequence = engine.scheduler.add(asked)
        for _ in range(tick):
            engine.step()
        phases.add(sequence.phase)
        engine.scheduler.preempt("a")
        engine.run()
        assert sequence.preemptions == 1
        assert engine.texts == alone.texts
    assert phases == {Phase.PREFILL, Phase.LOOPING}, "alone, it never waits for the edge"


def test_taken_out_while_it_waits_for_the_edge():
    asked = [request(id, max_tokens=9, key=ord(id), ends=()) for id in "ab"]
    engine = Engine(scheduler(edge_fraction=1))
    a, b = (engine.scheduler.add(each) for each in asked)
    while Phase.WAITING not in (a.phase, b.phase) or Phase.LOOPING not in (a.phase, b.phase):
        engine.step()
    waiting = a if a.phase is Phase.WAITING else b
    engine.scheduler.preempt(waiting.request.id)
    engine.step()
    assert (waiting.phase, waiting.resumes) == (Phase.SWAPPED, Phase.WAITING)
    assert engine.step().swap_in == [waiting]
    assert engine.run().texts == served(*asked).texts


@pytest.mark.parametrize("outcome", [Outcome.CANCELLED, Outcome.TIMEOUT])
def test_cancelled_while_taken_out(outcome):
    engine = Engine(scheduler(1, 400, overcommit=True))
    engine.scheduler.add(request("a", max_tokens=60, ends=()))
    for _ in range(10):
        engine.step()
    engine.scheduler.preempt("a")
    engine.step()
    assert engine.scheduler.counts()["swapped"] == 1
    engine.scheduler.cancel("a", outcome)
    assert engine.step().swap_in == []
    assert engine.outcomes == {"a": outcome}
    engine.scheduler.check()


def test_nothing_moves_while_a_first_token_is_chosen():
    """The token may come a tick late: its sequence stays where it is."""
    plan = scheduler(overcommit=True)
    sequence = plan.add(request("a"))
    plan.prefilled(plan.plan(0).chunk)
    plan.preempt("a")
    done = plan.plan(1)
    assert (done.swap_out, done.chunk, sequence.between) == ([], None, True)
    assert plan.entered(sequence, 5, 4) is None
