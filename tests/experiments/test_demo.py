"""The demo: its page and picture from recorded results, and everything from real training."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from experiments.__main__ import main
from experiments.demo.figure import draw
from experiments.demo.report import hop_summary, sudoku_summary, text_summary, write_report
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
    text = results.text
    for bits in (*text.looped_bits, text.dense_bits, text.flops_bits):
        assert f"{bits:.4f}" in page
    assert hop_summary(results.chains) in page
    assert sudoku_summary(results.sudoku) in page
    assert text_summary(text).replace("'", "&#39;") in page
    for loops, board in results.sudoku.boards.items():
        wrong = sum(a != b for a, b in zip(board, results.sudoku.solution, strict=True))
        assert (
            f"{loops} loops: {wrong} wrong" in page
            or f"{loops} loops: solved" in page
            or (f"1 loop: {wrong} wrong" in page)
        )
    assert "def read_lines(path):" in page
    assert "data:image/png;base64," in page
    assert not re.search(r'(src|href)="(?!data:)', page), "the report must need no other file"


def test_the_terminal_shows_every_depth(capsys):
    results = DemoResults.load(RECORDED)
    show(results, Console(width=120))
    shown = capsys.readouterr().out
    for depth, bits in zip(results.text.depths, results.text.looped_bits, strict=True):
        assert re.search(rf"\b{depth}\b.*{bits:.4f}", shown)
    for level, asked in zip(results.sudoku.levels, results.sudoku.asked, strict=True):
        assert f"{level} ({asked})" in shown


def test_results_survive_the_disk(tmp_path):
    results = DemoResults.load(RECORDED)
    results.save(tmp_path / "results.json")
    assert DemoResults.load(tmp_path / "results.json") == results


@pytest.mark.slow
def test_quick_demo(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--quick"]) == 0
    results = json.loads((out / "results.json").read_text())
    text = results["text"]
    assert f"{text['dense_bits']:.4f}" in capsys.readouterr().out
    assert max(text["depths"]) > 2 * text["trained_depth"]
    for task in ("chains", "sudoku", "text"):
        looped, dense = (results[task][model]["parameters"] for model in ("looped", "dense"))
        assert abs(looped - dense) < 0.005 * looped
    flops = text["flops"]["training_flops"] / text["looped"]["training_flops"]
    assert flops == pytest.approx(1, abs=0.1)
    assert 0 < text["rho"] <= 0.99609375
    assert (out / "report.html").exists()
    assert (out / "demo.png").stat().st_size > 10_000
