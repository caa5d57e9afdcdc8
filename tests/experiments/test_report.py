"""The committed page, results and pictures belong together, and to the present settings."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from experiments import report
from experiments.claim import (
    DOES_NOT_HOLD,
    HOLDS,
    HOLDS_IN_PART,
    UNCLEAR,
    Claim,
)
from experiments.listing import recorded
from experiments.results import Results, plain
from experiments.table import CLAIMS, committed_results, experiment

DOCS = report.checkout() / "docs"
claims = pytest.mark.parametrize("claim", CLAIMS)


def test_the_page_is_current() -> None:
    """Otherwise: python -m experiments report"""
    assert (DOCS / report.PAGE).read_text(encoding="utf-8") == report.page()


@claims
def test_every_word_is_there(claim: str) -> None:
    words = experiment(claim).CLAIM
    assert words.id == claim
    assert set(words.scales) >= {"cpu"}
    assert set(words.minutes) <= set(words.scales)
    recorded_scales = [scale for scale in words.scales if recorded(claim, scale)]
    assert set(words.minutes) >= set(recorded_scales)
    for field in fields(Claim):
        assert getattr(words, field.name) or field.name == "minutes", field.name


@claims
def test_cells_are_named_once_and_json_ready(claim: str) -> None:
    asked = experiment(claim)
    for scale in (*asked.CLAIM.scales, "quick"):
        cells = asked.cells(scale)
        names = [cell.name for cell in cells]
        assert len(set(names)) == len(names)
        for cell in cells:
            assert json.loads(json.dumps(cell.settings)) == plain(cell.settings)
        seeds = {arm: sum(cell.arm == arm for cell in cells) for arm in {c.arm for c in cells}}
        assert scale == "quick" or max(seeds.values()) >= 2


@claims
def test_recorded_results_are_whole_and_of_the_present_settings(claim: str) -> None:
    for scale in experiment(claim).CLAIM.scales:
        folder = committed_results(claim, scale)
        cells = experiment(claim).cells(scale)
        files = {path.stem for path in folder.glob("*")}
        assert files <= {cell.name for cell in cells}
        records = Results(folder).of(cells)
        assert len(records) in (0, len(cells))
        assert all(record.claim == claim and record.scale == scale for record in records)


@claims
def test_a_recorded_answer_has_a_picture_and_a_known_verdict(claim: str) -> None:
    for scale in experiment(claim).CLAIM.scales:
        known = recorded(claim, scale)
        assert (DOCS / report.PLOTS / report.plot_name(claim, scale)).exists() == bool(known)
        if known:
            summary = known[1]
            kind = summary.verdict.partition(":")[0]
            assert kind in (HOLDS, HOLDS_IN_PART, DOES_NOT_HOLD, UNCLEAR)
            assert all(len(row) == len(summary.head) for row in summary.rows)
