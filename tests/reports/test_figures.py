"""Figures: gaps, simplification of long curves, extreme data, escaping."""

from __future__ import annotations

import math
import random
import re

import pytest

from open_mythos.reports.figures import (
    ACCENT,
    Line,
    Mark,
    bars,
    curves,
    depth_curve,
    has_values,
    ramp,
)
from open_mythos.reports.html import heatmap, table
from tests.reports.html_reader import HOSTILE, Reader

NAN = math.nan


def strokes(svg: str) -> list[str]:
    """Return the path data of the curves of a figure."""
    return re.findall(r'<path d="([^"]*)" style="[^"]*stroke: var\(--accent\)', svg)


@pytest.mark.parametrize("gap", [NAN, math.inf, 1e200])
def test_a_value_that_is_not_finite_interrupts_the_curve(gap):
    steps = range(8)
    (whole,) = strokes(curves([Line([(x, 1.0 + x) for x in steps])], "whole"))
    (broken,) = strokes(curves([Line([(x, gap if x == 4 else 1.0 + x) for x in steps])], "gap"))
    assert (whole.count("M"), broken.count("M")) == (1, 2)


def test_a_point_between_gaps_is_a_dot():
    points = [(1.0, 2.0), (2.0, NAN), (3.0, 2.5), (4.0, NAN), (5.0, 1.0), (6.0, 1.5)]
    svg = curves([Line(points)], "gaps")
    assert svg.count("<circle") == 2
    assert curves([Line([(1.0, 2.0)])], "one point").count("<circle") == 1


def test_zero_has_no_logarithm():
    line = Line([(1, 0.0), (2, 1e-9), (3, -1.0)])
    assert curves([line], "logarithm", log=True).count("<circle") == 1
    assert has_values([line])
    assert not has_values([Line([(1, 0.0), (2, NAN)])], positive=True)


def test_long_curves_are_small_and_keep_their_extremes():
    noise = random.Random(0)
    points = [(float(i), noise.random()) for i in range(100_000)]
    points[33_333] = (33_333.0, 9.0)
    svg = curves([Line(points)], "long")
    (path,) = strokes(svg)
    heights = [float(y) for y in path.replace("M", "").split()[1::2]]
    assert len(svg) < 40_000
    assert min(heights) < min(y for y in heights if y != min(heights)) - 50


def test_texts_are_escaped():
    marks = [Mark(1.5, "alarm", HOSTILE), Mark(99, "alarm", "outside")]
    line = Line([(1, -1.0), (2, 3.0)], ramp(1, 3), "<b>")
    svg = curves([line], HOSTILE, marks=marks)
    read = Reader(svg)
    assert not {"script", "img"} & set(read.tags)
    assert (read.tags["title"], read.attributes.count(("aria-label", HOSTILE))) == (1, 1)


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 0.0), (2.5, 2.5), (-1.0, 3.0), (1e-9, 2e-9), (3.94, 4.01), (1, 1e9), (-1e30, 1e90)],
)
@pytest.mark.parametrize("options", [{}, {"zero": True}, {"log": True}, {"bound": 0.5, "x_end": 9}])
def test_extreme_values_are_drawn(low, high, options):
    if high > 0:
        Reader(curves([Line([(1, low), (2, high)])], "extreme", **options))


def test_other_figures_of_extreme_data():
    Reader(depth_curve([(1, 2.0)], "one depth", valid=(1, 1), mean=4.0, limit=2.05))
    many = depth_curve([(d, 2.0) for d in range(1, 65)], "many depths")
    assert 4 <= many.count("<text") <= 24
    Reader(bars([1], [0.0], "nothing", "x"))
    Reader(bars(range(1, 40), [2.0] * 39, "many", "x"))
    assert ACCENT not in many


def test_heatmap_and_table():
    few = heatmap([[0.25, 0.75], [0.5, 0.5]], 0.5)
    assert re.findall(r"--p:([\d.]+)\">(\d+)", few) == [
        ("0.500", "25"), ("1.000", "75"), ("1.000", "50"), ("1.000", "50")
    ]  # fmt: skip
    wide = Reader(heatmap([[1 / 256] * 256] * 64, 1 / 128))
    assert wide.tags["td"] == 64 * 256
    rows = Reader(table(("a", "b"), [(1, HOSTILE), (2, "x")], best=2))
    assert (rows.tags["script"], rows.attributes.count(("class", "set"))) == (0, 1)
