"""C8: optima of parabolas, exponents of laws, the verdict by the mark."""

from __future__ import annotations

import math

import pytest

from experiments import c8_power_laws as c8
from experiments.claim import DOES_NOT_HOLD, HOLDS, HOLDS_IN_PART


def test_the_optimum_of_a_parabola():
    mus = (1, 2, 4, 8)
    inside = [2 + (math.log2(mu) - 1.3) ** 2 for mu in mus]
    assert c8.optimum(mus, inside) == (pytest.approx(2**1.3), True)
    assert c8.optimum(mus, [1, 2, 4, 8]) == (1.0, False)
    assert c8.optimum(mus, [2, 3, 3, 1]) == (8.0, False), "it opens downwards: the best measured"


def test_the_exponent_of_a_law():
    assert c8.slope((1e12, 2e12, 8e12), [c**0.4 for c in (1e12, 2e12, 8e12)]) == pytest.approx(0.4)


def test_budgets_are_spent():
    for cell in c8.cells("cpu"):
        s = cell.settings
        train = s["run"]["train"]
        spent = s["per_token"] * train["steps"] * train["seq_len"] * train["global_batch"]
        assert spent == pytest.approx(s["budget"], rel=0.02)


def records(recorded, exponent, noise=0.0):
    found = []
    for cell in c8.cells("cpu"):
        s = cell.settings
        best = 1 + math.log2(s["budget"] / c8.BUDGETS[0]) * exponent
        loss = 2 + 0.1 * (math.log2(s["mu"]) - best) ** 2 + noise * cell.seed * s["mu"]
        found.append(recorded(cell, loss=loss))
    return found


@pytest.mark.parametrize(
    ("exponent", "verdict"), [(0.4, HOLDS), (1.2, HOLDS_IN_PART), (0.0, DOES_NOT_HOLD)]
)
def test_verdicts(recorded, exponent, verdict):
    assert c8.summarise(records(recorded, exponent)).verdict == verdict


def test_figures_and_plot(recorded, tmp_path):
    summary = c8.summarise(records(recorded, 0.4))
    assert "loops ~ C^0.40 [0.40, 0.40]" in summary.key
    c8.plot(summary, tmp_path / "c8.png")
    assert (tmp_path / "c8.png").stat().st_size > 10_000


def test_quick_cell_runs(place):
    (cell,) = c8.cells("quick")
    assert 0 < c8.run_cell(cell, place)["loss"] < 8
