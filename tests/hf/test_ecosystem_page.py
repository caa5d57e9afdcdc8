"""The programs of docs/ecosystem.md run, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "ecosystem.md"
SECTIONS = ("transformers", "Trainer", "PEFT", "TRL")


def programs(section: str) -> str:
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return "\n".join(re.findall(r"^```py\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_every_program(tmp_path, monkeypatch):
    """One section after the other, in one program, as a reader would."""
    for package in ("peft", "trl", "datasets"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    namespace = {"__name__": "page"}
    for section in SECTIONS:
        code = programs(section)
        assert code, section
        exec(compile(code, f"{PAGE.name}: {section}", "exec"), namespace)
    assert namespace["deep"].shape[1] == namespace["shallow"].shape[1]
    assert (tmp_path / "looped" / "model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_first_section(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(programs("transformers"), PAGE.name, "exec"), {"__name__": "page"})
