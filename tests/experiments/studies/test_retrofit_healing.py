"""The study of healing runs at a tiny size, continues where it was stopped, and shows its table."""

from __future__ import annotations

import pytest
import torch

from experiments.studies import retrofit_healing
from experiments.studies.common import ROOT, load
from experiments.studies.retrofit_healing import STUDY, main, markdown


@pytest.fixture
def small(monkeypatch):
    texts = ["the quick brown fox jumps over the lazy dog " * 20 + str(i) for i in range(20)]
    monkeypatch.setattr(retrofit_healing, "texts", lambda scale: iter(texts))
    monkeypatch.setattr(retrofit_healing, "VAL_FRACTION", 0.3)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_it_runs_and_does_not_repeat_what_is_done(small, tmp_path, monkeypatch, capsys):
    out = tmp_path / "found.json"
    arguments = ["--quick", "--steps", "3", "--out", str(out), "--work", str(tmp_path / "work")]
    main(arguments)
    found = load(out)
    assert found["tokens"] == 3 * 2 * 16
    looped, dense = found["looped"], found["dense"]
    assert looped["before"]["1"] == pytest.approx(dense["before"]["dense"], abs=1e-5)
    assert looped["after"]["1"] < looped["before"]["1"]
    assert dense["after"]["dense"] < dense["before"]["dense"]
    assert out.with_suffix(".png").stat().st_size > 1000
    assert retrofit_healing.markdown(found) in capsys.readouterr().out
    assert str(tmp_path) not in out.read_text()
    monkeypatch.setattr(retrofit_healing, "train_run", None)
    main(arguments)
    assert load(out) == found | {"machine": load(out)["machine"]}


def test_a_run_is_as_long_as_asked(small, tmp_path, monkeypatch):
    seconds = iter([0.0, 2.0, 10.0, 16.0])  # 2 s for one step, 6 s for three
    monkeypatch.setattr(retrofit_healing.time, "perf_counter", lambda: next(seconds))
    monkeypatch.setattr(retrofit_healing, "train_run", lambda config: None)
    scale = retrofit_healing.QUICK
    retrofit_healing.prepared(scale, tmp_path)
    assert retrofit_healing.steps_of(scale, tmp_path, minutes=1.0) == 30
    assert retrofit_healing.steps_of(scale, tmp_path, minutes=9.0) == 30  # kept


@pytest.mark.skipif(not STUDY.results.exists(), reason="not recorded yet")
def test_the_page_shows_the_recorded_results():
    page = ROOT / "docs" / "retrofit.md"
    assert markdown(load(STUDY.results)) in page.read_text(encoding="utf-8")
    assert STUDY.picture.exists()
