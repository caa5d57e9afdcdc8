"""docs/speed.md says what the results say, in words, tables and pictures."""

import re

import pytest

from benchmarks import plots, report, store
from benchmarks.measure import Absent, Finding, Row
from benchmarks.roofline import Floor

PAGE = report.PAGE


def test_the_page_is_what_the_results_say():
    """Otherwise: python -m benchmarks.report"""
    text = PAGE.read_text(encoding="utf-8")
    assert report.remade(text) == text
    assert store.machines()
    for folder in store.machines():
        assert f"benchmarks/results/{folder.name}/" in text


def test_the_pictures_are_of_these_results():
    """Otherwise: python -m benchmarks.report"""
    drawn = [plot for folder in store.machines() for plot in plots.of(folder, store.load(folder))]
    assert drawn
    for plot in drawn:
        assert plots.stored_digest(plot.path) == plot.digest, plot.path.name
    assert {plot.path for plot in drawn} == set(plots.FOLDER.glob("*.png"))


def made_up():
    """Results with a row of every kind."""
    floor = Floor(0.5, "memory", 1e9, 1e9, 1e12, 1e9)
    rows = {
        "training": [
            Row("mla, 4 experts", "float32", 1.0, 1.5, 1.5, 1.5, 2.0, 1e-7, 0.0, rest_seconds=0.75,
                rest="other parts", dense_seconds=2.0, floor=floor),
            Row("mla, 8 experts", "bfloat16", 1.0, 3.0, 3.0, 3.0, 2.0, 1e-2, 1e-2),
            Absent("mla, 9 experts", "bfloat16", "out of memory: no room"),
        ],
        "experts": [
            Row(f"{n} experts", "float32", 0.1 * n, 0.3 * n, 3.0, 3.0, None, 1e-7, 0.0,
                numbers={"experts": n}) for n in (8, 16)
        ],
        "loops": [
            *(Finding(f"training, {n} loops", "float32", 0.1 * n, "us a token", seconds=0.1 * n,
                      numbers={"loops": n, "tokens": 10}) for n in (1, 2)),
            Finding("training: spread", "float32", 7.0, "%", goal=5.0, at_most=True, why="noise",
                    numbers={"seconds_per_loop": 0.1}),
        ],
        "context": [
            *(Finding(f"mla, context {n}", "float32", n, "tok/s", seconds=1e-5 * n,
                      numbers={"context": n}) for n in (512, 1024)),
            Finding("mla, line", "float32", 2.0, "%", numbers={"seconds_per_position": 1.0}),
        ],
        "engine": [
            Finding(f"{case}: engine over full depth", "float32", 2.0, "x",
                    numbers={"full, tokens per CPU s": 100.0, "engine, tokens per CPU s": 200.0,
                             "lockstep, tokens per CPU s": 150.0, "mean_depth": 6.0})
            for case in ("short", "long", f"{plots.BY_DEPTH} 6")
        ],
        "batch": [
            Finding(f"batch {n}", "float32", 10.0 * n, "tok/s", seconds=0.1,
                    numbers={"batch": n, "over_first": float(n)}) for n in (1, 8)
        ],
    }  # fmt: skip
    description = {"processor": "chip", "threads": 2, "date": "2026-01-01", "commit": "abc",
                   "torch": "2", "instructions": "all"}  # fmt: skip
    return {
        suite: {"suite": suite, "title": f"title of {suite}", "machine": description,
                "others": 0.3 if suite == "batch" else 0.0, "stopped": "",
                "rows": [store.as_json(row) for row in each]}
        for suite, each in rows.items()
    }  # fmt: skip


def test_goals_are_shown_row_by_row_with_the_reason_of_a_miss():
    goals = report.goals(made_up())
    assert [(goal.goal, goal.measured, goal.verdict) for goal in goals] == [
        (">= 2x", "1.50x", "MISSED"), (">= 2x", "3.00x", "met"), ("<= 5 %", "7 %", "MISSED"),
    ]  # fmt: skip
    assert goals[0].reason == (
        "other parts take 750 ms, 75% of the fast time and 50% of the plain time: at most "
        "2.0x if all else were free; of the roofline (memory) fast reaches 50%, "
        "plain 33%"
    )
    assert goals[1].reason == ""
    assert goals[2].reason == "noise"


def test_the_section_of_a_machine(tmp_path):
    text = report.section(tmp_path / "chip-2-threads", made_up())
    assert text.startswith("### chip, 2 threads\n")
    assert "1 met, 2 missed" in text
    assert "Other processes used 30% of all cores" in text
    assert "out of memory: no room" in text
    assert "| mla, 4 experts | float32 | 1 s | 1.50x | >= 2x | MISSED | 50 % (memory) |" in text
    # tables are tables: as many cells in every line
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_every_plot_is_drawn_and_carries_its_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "FOLDER", tmp_path)
    results = made_up()
    drawn = list(plots.of(tmp_path / "chip", results))
    assert [plot.path.stem for plot in drawn] == [
        f"chip_{name}"
        for name in ("ratios", "experts", "loops", "context", "batch", "engine", "engine_depth")
    ]
    assert drawn[0].title == "1.5x to 3.0x as fast as the reference; 1 of 2 goals met"
    for plot in drawn:
        plot.draw()
        assert plots.stored_digest(plot.path) == plot.digest
    assert drawn[-2].title == "The engine: 2.0x to 2.0x the tokens of full depth"
    results["batch"]["rows"][0]["value"] += 1
    assert list(plots.of(tmp_path / "chip", results))[-3].digest != drawn[-3].digest


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(1.5, "x", "1.5x"), (12345.6, "tok/s", "12,346 tok/s"), (0.3, "s", "0.3 s"),
     (3e-6, "", "3.0e-06"), (1.02, "x the time", "1.02x the time")],
)  # fmt: skip
def test_numbers_have_few_figures(value, unit, text):
    assert report.with_unit(value, unit) == text


def test_results_are_written_whole(tmp_path):
    path = store.save(tmp_path / "machine", "loops", {"rows": []})
    assert store.load(tmp_path / "machine") == {"loops": {"rows": []}}
    assert store.machines(tmp_path) == [tmp_path / "machine"]
    assert [p.name for p in path.parent.iterdir()] == ["loops.json"]
