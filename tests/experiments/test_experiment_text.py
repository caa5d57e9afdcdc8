"""Text for every claim: prepared once, and trainings that go on where they stopped."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest

from experiments import c5_saturation as c5
from experiments import text
from experiments.claim import Cell
from open_mythos.data import TokenShards


def test_the_library_is_prepared_once(place, monkeypatch):
    folder = text.standard_library(place.shared)

    def again(*_: object, **__: object) -> None:
        raise AssertionError("prepared twice")

    monkeypatch.setattr(text, "prepare", again)
    assert text.standard_library(place.shared) == folder
    assert text.validation(folder, seq_len=16, windows=4)[0].input_ids.shape == (4, 16)


def test_bits_are_those_of_the_bytes_of_the_text(place, tmp_path):
    (quick,) = c5.cells("quick")
    trained = text.train(quick, replace(place, own=tmp_path / "own"))
    # of bytes, every token but the end of a document is one byte
    ratio = trained.bits_per_byte([2])[0] / trained.losses([2])[0]
    assert ratio == pytest.approx(1 / math.log(2), rel=1e-3)
    assert ratio > 1 / math.log(2)


def test_sources_of_packages_hold_no_tests(place, monkeypatch):
    monkeypatch.setattr(text, "read_documents", lambda source: iter(["the standard library"]))
    monkeypatch.setattr(text, "PACKAGES", ("networkx",))
    first, *sources = text._package_sources()
    assert first == "the standard library"
    assert 100 < len(sources) < 1000
    assert not any("import pytest" in source for source in sources[::20])
    assert sum("def bellman_ford_path(" in source for source in sources) == 1
    monkeypatch.setattr(text, "PACKAGES_VOCABULARY", 320)
    monkeypatch.setattr(
        text, "_package_sources", lambda: iter([source * 9 for source in sources[::10]])
    )
    folder = text.packages(place.shared)
    assert TokenShards(folder).tokenizer().vocab_size == 320
    assert 1 < TokenShards(folder, "val").bytes_per_token < 3


def test_the_second_of_two_workers_takes_the_first_one_s(place, tmp_path, monkeypatch):
    def slow(source: str, out, tokenizer, **_: object) -> None:
        """By the time this worker is done, another one is."""
        for folder in (out, tmp_path / out.name.replace(out.name, first.name)):
            folder.mkdir(parents=True)
            (folder / "index.json").write_text("theirs" if folder != out else "mine")

    first = text.standard_library(place.shared)
    monkeypatch.setattr(text, "prepare", slow)
    found = text.standard_library(tmp_path)
    assert (found / "index.json").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == [first.name]


def test_an_interrupted_training_goes_on(place, tmp_path):
    (quick,) = c5.cells("quick")
    train = quick.settings["run"]["train"] | {"log_every": 1}
    run = quick.settings["run"] | {"train": train}
    cell = Cell("resumed", 0, quick.settings | {"run": run, "save_every": 2})
    mine = replace(place, own=tmp_path / "own")
    whole = text.train(cell, mine)
    assert [step for step, _ in whole.curve] == [1, 2, 3, 4]
    shutil.rmtree(max((mine.own / "checkpoints").iterdir()))
    resumed = text.train(cell, mine)
    assert [step for step, _ in resumed.curve] == [3, 4]
    assert resumed.losses([4]) == whole.losses([4])
    for checkpoint in (mine.own / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    again = text.train(cell, mine)
    assert [step for step, _ in again.curve] == [1, 2, 3, 4], "killed before its first checkpoint"
