"""C5: the fits find what was put in, and the verdict tells saturation from other curves."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from experiments import c5_saturation as c5
from experiments.c5_saturation.fits import FORMS, fit
from experiments.claim import DOES_NOT_HOLD, HOLDS, HOLDS_IN_PART, UNCLEAR
from open_mythos.train import RunConfig

TRUTH: dict[str, Callable[[int], float]] = {
    "exponential": lambda t: 1.8 + 0.5 * math.exp(-0.9 * t),
    "floor_power": lambda t: 1.8 + 0.5 * t**-1.3,
    "power": lambda t: 2.3 * t**-0.05,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_found_and_predicts_best(form):
    losses = [TRUTH[form](t) for t in range(1, 25)]
    fits = {name: fit(name, range(1, 9), losses[:8]) for name in FORMS}

    def error(name: str) -> float:
        predicted = fits[name].predict(range(9, 25))
        return max(abs(p - y) for p, y in zip(predicted, losses[8:], strict=True))

    assert error(form) < 2e-3
    # a power law with a floor contains the one without
    rivals = [name for name in FORMS if name != form and (form, name) != ("power", "floor_power")]
    assert all(error(form) < error(name) / 3 for name in rivals)


def test_a_rising_curve_is_fitted_as_flat():
    found = fit("exponential", range(1, 5), [2.0, 2.1, 2.2, 2.3])
    assert found.scale == pytest.approx(0.0, abs=1e-9)
    assert found.floor == pytest.approx(2.15)


def saturated(mu: int) -> Callable[[int], float]:
    """Within 0.2 % of its floor at mu."""
    return lambda t: 1.8 + 0.3 * math.exp(-9.0 / mu * t)


def overthinking(mu: int) -> Callable[[int], float]:
    return lambda t: saturated(mu)(t) + 0.05 * max(0, t - mu)


def still_falling(mu: int) -> Callable[[int], float]:
    return lambda t: 1.8 + 0.5 * t**-0.5


def flat(mu: int) -> Callable[[int], float]:
    return lambda t: 1.8


def records(recorded, curve_of):
    return [
        recorded(cell, parameters=10,
                 losses=[curve_of(cell.settings)(t) + 1e-3 * cell.seed for t in range(1, 25)])
        for cell in c5.cells("cpu")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "verdict"),
    [(saturated, HOLDS), (still_falling, DOES_NOT_HOLD), (flat, UNCLEAR)],
)
def test_verdicts(recorded, shape, verdict):
    found = records(recorded, lambda settings: shape(settings["mu"]))
    assert c5.summarise(found).verdict.startswith(verdict)


def test_some_curves_make_a_part(recorded, tmp_path):
    def curve(settings):
        return (saturated if settings["shape"] == "loop" else still_falling)(settings["mu"])

    summary = c5.summarise(records(recorded, curve))
    assert summary.verdict == HOLDS_IN_PART
    assert summary.key.startswith("2/4 curves")
    c5.plot(summary, tmp_path / "c5.png")
    assert (tmp_path / "c5.png").stat().st_size > 10_000


def test_flat_curves_do_not_count(recorded):
    def curve(settings):
        return (saturated if settings["shape"] == "loop" else flat)(settings["mu"])

    assert c5.summarise(records(recorded, curve)).key.startswith("2/2 curves")


def test_quick_cell_runs(place):
    (cell,) = c5.cells("quick")
    figures = c5.run_cell(cell, place)
    assert len(figures["losses"]) == 24
    assert all(0 < loss < 8 for loss in figures["losses"])
    assert figures["tokens"] == 4 * 4 * 16


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_settings_are_valid(scale):
    for cell in c5.cells(scale):
        RunConfig.from_dict(cell.settings["run"])
