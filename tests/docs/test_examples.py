"""The examples run; in full where that is slow, with the results that their text promises."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
from doc_blocks import ROOT

EXAMPLES = ROOT / "examples"


def run(
    name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> str:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_usage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    printed = run("usage.py", [], monkeypatch, capsys)
    for attn_type in ("gqa", "mla"):
        assert f"[{attn_type}] logits            (2, 16, 1000)" in printed
        assert f"[{attn_type}] generated         (2, 24)" in printed


def test_custom_looped_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    printed = run("custom_looped_model.py", ["--steps", "4"], monkeypatch, capsys)
    assert "loss at 16 loops" in printed
    assert "with the gate" in printed


@pytest.mark.slow
def test_custom_looped_model_extrapolates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    printed = run("custom_looped_model.py", [], monkeypatch, capsys)
    rows = {
        label: [float(value) for value in re.findall(r"([\d.]+)%?(?=\s|$)", values)]
        for label, values in re.findall(r"^ +(\d+|loops|accuracy)((?: +[\d.]+%?)+)$", printed, re.M)
    }
    assert rows["8"][0] > 95  # eight loops reach eight places
    assert rows["8"][2] < 60  # and no further
    assert min(rows["32"]) > 95  # trained on 16 places, right on 32
    shallow, *_, deep = rows["loops"]
    assert deep > 3 * shallow  # the gate gives later places more loops


def test_train_on_your_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    text = tmp_path / "text.md"
    text.write_text("".join(f"Line {i} is about the number {i * i}.\n" for i in range(4000)))
    printed = run("train_on_your_text.py", [str(text), "--steps", "2"], monkeypatch, capsys)
    assert "bits per byte" in printed
    depths = re.findall(r"^ +(\d+) +[\d.]+ +[\d.]+$", printed, re.MULTILINE)
    assert depths == ["1", "2", "4", "8", "16"]
