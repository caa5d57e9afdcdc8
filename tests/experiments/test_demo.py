"""The demo, shortened: everything it promises appears, from real training."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from experiments.__main__ import main


def test_a_folder_of_the_users_is_never_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["demo", "--out", str(tmp_path), "--quick"]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_quick_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--quick"]) == 0
    text = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    for depth, bits in zip(results["depths"], results["looped_bits"], strict=True):
        assert re.search(rf"\b{depth}\b.*{bits:.4f}", text)
    assert f"{results['dense_bits']:.4f}" in text
    assert max(results["depths"]) > results["max_depth"]
    looped, dense = results["looped"]["parameters"], results["dense"]["parameters"]
    assert abs(looped - dense) < 0.005 * looped
    assert 0 < results["rho"] <= 0.99609375
    assert all(abs(sum(row) - 1) < 1e-4 for row in results["expert_load"])
    page = (out / "report.html").read_text()
    assert f"{results['looped_bits'][0]:.4f}" in page
    assert "data:image/png;base64," in page
    assert not re.search(r'(src|href)="(?!data:)', page), "the report must need no other file"
    assert (out / "demo.png").stat().st_size > 10_000
