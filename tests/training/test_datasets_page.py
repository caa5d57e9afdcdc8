"""Run the commands of docs/datasets.md."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from open_mythos.cli import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
LINES = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_texts").mkdir()
    Path("my_texts", "a.txt").write_text("some text\n" * 100)
    tried = 0
    for line in LINES:
        program, *argv = shlex.split(line, comments=True)
        if "SOURCE" in argv:
            continue  # a placeholder
        if program == "python":
            script, *argv = argv
            monkeypatch.setattr(sys, "argv", [script, *argv])
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            assert ended.value.code == 0, line
        else:
            assert program == "open-mythos"
            assert main(argv) == 0, line
        tried += 1
    assert tried >= 10
    printed = capsys.readouterr().out
    assert "30,000,283,648 tokens in 57,221 steps" in printed
    assert "hf://datasets/HuggingFaceFW/fineweb-edu/sample/100BT" in printed
    assert "prepared shards, tokens: train" in printed
