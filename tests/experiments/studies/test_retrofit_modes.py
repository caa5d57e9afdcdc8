"""The study of untrained retrofits runs on a tiny model; the page shows what was recorded."""

from __future__ import annotations

import pytest
from interop.dense_models import dense_model, words

from experiments.studies import retrofit_modes
from experiments.studies.common import ROOT, load
from experiments.studies.retrofit_modes import MODES, OTHERS, STUDY, main, markdown

PAGE = ROOT / "docs" / "retrofit.md"


@pytest.mark.slow  # the command, several times
def test_it_runs_and_every_row_starts_from_the_dense_model(tmp_path, monkeypatch, capsys):
    folder, out = tmp_path / "hf", tmp_path / "found.json"
    dense_model("llama, tied").save_pretrained(folder)
    words().save_pretrained(folder)
    monkeypatch.setattr(retrofit_modes, "model_file", lambda: folder)
    monkeypatch.setattr(retrofit_modes, "SPLITS", ((2, 2, 2),))
    monkeypatch.setitem(retrofit_modes.topics, "compound", "w1 w2 w3 w1 w4 w5 w9 w2 w6 w5")
    main(["--out", str(out)])
    found = load(out)
    assert [row["mode"] for row in found["rows"]] == [*MODES, *OTHERS]
    for row in found["rows"]:
        assert row["losses"][0] == pytest.approx(found["dense"], abs=1e-5)
        assert abs(row["losses"][2] - found["dense"]) > 1e-4
    assert all(row["difference"]["logits"] == 0 for row in found["rows"] if row["mode"] in MODES)
    assert len({tuple(row["losses"]) for row in found["rows"]}) == len(found["rows"])
    assert markdown(found) in capsys.readouterr().out
    monkeypatch.setattr(retrofit_modes, "retrofitted", None)
    main(["--out", str(out)])  # nothing is measured twice


@pytest.mark.skipif(not STUDY.results.exists(), reason="not recorded yet")
def test_the_page_shows_the_recorded_results():
    assert markdown(load(STUDY.results)) in PAGE.read_text(encoding="utf-8")
