"""The notebooks on other people's checkpoints run on tiny weights, and show what they say."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from doc_blocks import ROOT
from interop.checkpoints import VOCAB
from interop.dense_models import dense_model
from interop.equality import write
from interop.references import example
from interop.test_everywhere import tokenizer

from open_mythos.tokenizer import ByteTokenizer

NOTEBOOKS = ("open_a_looped_checkpoint", "make_your_model_recurrent")


def cells(name: str) -> list[dict[str, Any]]:
    text = (ROOT / "examples" / f"{name}.ipynb").read_text(encoding="utf-8")
    return json.loads(text)["cells"]


def run(name: str, values: dict[str, Any], monkeypatch, tmp_path: Path) -> dict[str, Any]:
    """Run every cell with other values for the capitals of the first one; return all names."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    plt.close("all")
    namespace: dict[str, Any] = {"__name__": "notebook"}
    code = ["".join(cell["source"]) for cell in cells(name) if cell["cell_type"] == "code"]
    for number, source in enumerate(code):
        exec(compile(source, f"{name}, cell {number}", "exec"), namespace)
        if number == 0:
            assert values.keys() <= namespace.keys()
            namespace |= values
    namespace["figures"] = len(plt.get_fignums())
    plt.close("all")
    return namespace


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_source_alone_and_links_that_lead_somewhere(name):
    for cell in cells(name):
        assert cell["id"]
        assert not cell.get("outputs")
        if cell["cell_type"] == "code":
            ast.parse("".join(cell["source"]))
    text = "".join(line for cell in cells(name) for line in cell["source"])
    for place in (part.partition(")")[0] for part in text.split("](")[1:]):
        assert (ROOT / "examples" / place).resolve().is_file(), place


def test_open_a_looped_checkpoint(monkeypatch, tmp_path):
    source = write(example("ouro"), tmp_path / "ouro")
    (source / "tokenizer.json").write_text(tokenizer())
    end = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|end|>")
    (source / "tokenizer_config.json").write_text(json.dumps(end))
    values = {"SOURCE": str(source), "PROMPT": "a loop runs again", "LOOPS": 5}
    found = run(NOTEBOOKS[0], values, monkeypatch, tmp_path)
    assert found["record"].family == "ouro"
    assert tuple(found["change_LT"].shape) == (5, 4)
    assert len(found["likely"]) == 5
    assert {len(row) for row in found["lens"]} == {4}
    assert found["lens"][0].shape[-1] >= VOCAB
    assert set(found["said"]["2 loops"].loops) == {2}
    assert max(found["said"]["until the state rests"].loops) <= 5
    assert found["figures"] == 1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_make_your_model_recurrent(monkeypatch, tmp_path):
    folder = tmp_path / "llama"
    dense_model("llama", vocab_size=320).save_pretrained(folder)
    ByteTokenizer().to_rust().save(folder)
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "loops.txt").write_text("a loop runs again and again and again\n" * 200)
    values = {"MODEL": str(folder), "TEXT": str(texts / "loops.txt"), "STEPS": 6}
    found = run(NOTEBOOKS[1], values, monkeypatch, tmp_path)
    assert found["same"].state == 0.0
    convex = found["before"]["convex"]
    assert convex.losses[1] == pytest.approx(convex.dense, abs=1e-5)
    assert found["after"].losses[2] < convex.losses[2], "healing helps"
    assert found["figures"] == 1
