"""Text for every claim: prepared once, and trainings that go on where they stopped."""

from __future__ import annotations

import shutil
from dataclasses import replace

from experiments import c5_saturation as c5
from experiments import text
from experiments.claim import Cell


def test_the_library_is_prepared_once(place, monkeypatch):
    folder = text.standard_library(place.shared)

    def again(*_: object, **__: object) -> None:
        raise AssertionError("prepared twice")

    monkeypatch.setattr(text, "prepare", again)
    assert text.standard_library(place.shared) == folder
    assert text.validation(folder, seq_len=16, windows=4)[0].input_ids.shape == (4, 16)


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
