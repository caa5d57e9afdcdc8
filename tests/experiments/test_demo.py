"""The demo: its page and picture from recorded results, and everything from real training."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from experiments.__main__ import main
from experiments.demo.figure import draw
from experiments.demo.report import hop_summary, text_summary, write_report
from experiments.demo.results import DemoResults
from experiments.demo.terminal import show

RECORDED = Path(__file__).parents[2] / "docs" / "demo" / "results.json"


def test_other_folders_are_never_replaced(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["demo", "--out", str(tmp_path), "--quick"]) == 2
    assert "not from the demo" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_page_and_picture(tmp_path):
    results = DemoResults.load(RECORDED)
    draw(results, tmp_path / "demo.png")
    write_report(results, tmp_path / "demo.png", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for bits in (*results.looped_bits, results.dense_bits):
        assert f"{bits:.4f}" in page
    assert hop_summary(results) in page
    assert text_summary(results).replace("'", "&#39;") in page
    assert "def read_lines(path):" in page
    assert "data:image/png;base64," in page
    assert not re.search(r'(src|href)="(?!data:)', page), "the report must need no other file"


def test_the_terminal_shows_every_depth(capsys):
    results = DemoResults.load(RECORDED)
    show(results, Console(width=120))
    shown = capsys.readouterr().out
    for depth, bits in zip(results.depths, results.looped_bits, strict=True):
        assert re.search(rf"\b{depth}\b.*{bits:.4f}", shown)


def test_results_survive_the_disk(tmp_path):
    results = DemoResults.load(RECORDED)
    results.save(tmp_path / "results.json")
    assert DemoResults.load(tmp_path / "results.json") == results


@pytest.mark.slow
def test_quick_demo(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--quick"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert f"{results['dense_bits']:.4f}" in capsys.readouterr().out
    assert max(results["depths"]) > results["max_depth"]
    looped, dense = results["looped"]["parameters"], results["dense"]["parameters"]
    assert abs(looped - dense) < 0.005 * looped
    assert 0 < results["rho"] <= 0.99609375
    assert all(abs(sum(row) - 1) < 1e-4 for row in results["expert_load"])
    assert (out / "report.html").exists()
    assert (out / "demo.png").stat().st_size > 10_000
