"""Jobs of the engine's benchmark, and its gate."""

from collections import Counter
from statistics import fmean

import pytest

from benchmarks import depths
from benchmarks.engine_forms import ENGINE, compare_forms
from benchmarks.measure import GateError
from benchmarks.models import QUICK, build
from benchmarks.replay import RecordedDepths
from benchmarks.static_batch import FULL, LOCKSTEP, StaticBatch


@pytest.mark.parametrize("shape", ["geometric", "lognormal", "two depths"])
def test_depths_have_the_mean_and_the_range(shape):
    found = depths.depths(shape, 700, 6.0, 16)
    assert fmean(found) == pytest.approx(6.0, abs=0.05)
    assert min(found) >= 1
    assert max(found) <= 16
    if shape == "two depths":
        assert Counter(found) == {2: 500, 16: 200}


def small_jobs(lengths=(3, 5, 4)):
    given = depths.depths("geometric", sum(lengths), 2.0, 4)
    return depths.jobs(lengths, given, 3, 4, 1024)


def test_forms_agree_and_the_bound_is_above_one():
    model = build(QUICK, "mla", (4, 2)).eval()
    found = compare_forms(model, small_jobs(), 4, 2, turns=1)
    assert found.bound > 1
    assert found.n_tokens == 9
    assert {f"{FULL}, median CPU s", f"{ENGINE}, least wall s"} <= set(found.numbers())


def test_the_gate_stops_a_form_that_ignores_the_depths(monkeypatch):
    model = build(QUICK, "mla", (4, 2)).eval()
    monkeypatch.setattr(StaticBatch, "_loops", lambda self, e, ctx, depths, n: e.float())
    with pytest.raises(GateError, match="other tokens"):
        compare_forms(model, small_jobs(), 4, 2, forms=(LOCKSTEP, ENGINE), turns=1)


def test_the_gate_stops_an_engine_of_other_depths(monkeypatch):
    model = build(QUICK, "mla", (4, 2)).eval()
    monkeypatch.setattr(
        RecordedDepths, "stops", lambda self, kinds, slots_R, *_: slots_R == slots_R
    )
    with pytest.raises(GateError, match="not as recorded"):
        compare_forms(model, small_jobs(), 4, 2, forms=(FULL, ENGINE), turns=1)
