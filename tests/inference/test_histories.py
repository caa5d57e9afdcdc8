"""The books hold after every call, in random histories of everything that can happen."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from open_mythos.errors import ConfigError, EnvironmentError_
from open_mythos.inference.pages import Layout, Pages
from open_mythos.inference.request import Outcome
from tests.inference.simulated import Engine, request, scheduler

PICK = st.integers(0, 1000)


class History(RuleBasedStateMachine):
    """Requests that come, are cancelled, fail, are taken out, run late, and share prompts."""

    @initialize(
        n_slots=st.integers(1, 6),
        n_pages=st.integers(80, 250),
        overcommit=st.booleans(),
        fraction=st.sampled_from([0.125, 0.5, 1.0]),
        layout=st.sampled_from([Layout(1, 1, 1, page=4), Layout(2, 2, 1, True, 8)]),
    )
    def begin(self, n_slots, n_pages, overcommit, fraction, layout):
        self.engine = Engine(
            scheduler(
                n_slots, n_pages, 120, overcommit=overcommit, edge_fraction=fraction,
                layout=layout, max_queued=30,
            )
        )  # fmt: skip
        self.plan, self.added, self.refused, self.ids = self.engine.scheduler, 0, 0, 0

    @rule(
        n=st.sampled_from([1, 1, 2, 6]), prompt=st.integers(1, 70), kind=st.integers(0, 1),
        new=st.integers(1, 40), loops=st.sampled_from([1, 4]),
        late=st.sampled_from([None, None, None, 30]), scored=st.sampled_from([False, False, True]),
        salt=st.sampled_from(["", "", "other"]),
    )  # fmt: skip
    def add(self, n, prompt, kind, new, loops, late, scored, salt):
        for _ in range(n):
            self.ids += 1
            asked = request(
                str(self.ids), [*([7] * (prompt - 1)), kind], 0 if scored and new == 1 else new,
                key=self.ids, max_loops=loops, prompt_logprobs=scored, salt=salt,
                deadline=None if late is None else self.engine.now + late,
            )  # fmt: skip
            try:
                self.plan.add(asked)
                self.added += 1
            except (ConfigError, EnvironmentError_):
                self.refused += 1

    def live(self, pick):
        """Any live sequence, or None."""
        live = list(self.plan._live.values())
        return live[pick % len(live)] if live else None

    @rule(pick=PICK, outcome=st.sampled_from([Outcome.CANCELLED, Outcome.STOP_STRING]))
    def cancel(self, pick, outcome):
        if sequence := self.live(pick):
            self.plan.cancel(sequence.request.id, outcome)

    @rule(pick=PICK)
    def fail(self, pick):
        if sequence := self.live(pick):
            self.plan.fail(sequence, "an error")
            self.engine._note(sequence)

    @rule(pick=PICK)
    def preempt(self, pick):
        if sequence := self.live(pick):
            self.plan.preempt(sequence.request.id)

    @rule(ticks=st.sampled_from([1, 3, 20, 60]))
    @precondition(lambda self: self.plan.busy)
    def step(self, ticks):
        for _ in range(ticks):
            self.engine.step()
            self.plan.check()

    @invariant()
    def the_books_hold(self):
        if hasattr(self, "plan"):
            self.plan.check()
            counts = self.plan.counts()
            ended = counts["finished"] + counts["cancelled"] + counts["failed"]
            assert counts["admitted"] == self.added == ended + counts["live"]
            assert ended == len(self.engine.outcomes)
            assert sum(counts[f"pages_{s}"] for s in ("free", "cached", "held")) == counts["pages"]
            slots = Counter(each.slot for each in self.plan.places.running())
            assert slots == Counter(n for n, e in enumerate(self.plan.places.slots) if e)

    def teardown(self):
        """Everybody ends, and nothing is held."""
        if hasattr(self, "plan"):
            self.engine.run()
            assert len(self.engine.outcomes) == self.added
            counts = self.plan.counts()
            assert counts["pages_free"] + counts["pages_cached"] == counts["pages"]
            assert counts["slots_used"] == 0


QUICK = settings(max_examples=40, stateful_step_count=50)

FIRST_FAILURE = settings(
    QUICK, max_examples=80, phases=[Phase.generate], report_multiple_bugs=False
)


def test_histories():
    run_state_machine_as_test(History, settings=QUICK)


@pytest.mark.slow
def test_many_histories():
    run_state_machine_as_test(History, settings=settings(QUICK, max_examples=300))


def breaks(monkeypatch, owner, name, broken) -> None:
    """The histories fail when ``owner.name`` is replaced."""
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(Exception):  # noqa: B017, PT011
        run_state_machine_as_test(History, settings=FIRST_FAILURE)


def test_a_leak_breaks_them(monkeypatch):
    release = Pages.release
    breaks(monkeypatch, Pages, "release", lambda self, pages: release(self, list(pages)[1:]))


def test_early_release_breaks_them(monkeypatch):
    """Cached units that are given up though somebody holds them."""

    def hold(self, key):
        pages = self._units[key]
        for page in pages:
            self._holders[page] += 1
        return pages

    breaks(monkeypatch, Pages, "hold", hold)
