"""Both measurements of quantized weights run at a tiny size; the page shows what was recorded."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from benchmarks import quantized
from benchmarks.measure import GateError
from benchmarks.models import QUICK
from experiments.studies import quantized_quality
from experiments.studies.common import ROOT, load
from experiments.studies.quantized_quality import FULL, KINDS, STUDY, main
from open_mythos.data import prepare
from open_mythos.tokenizer import ByteTokenizer

PAGE = ROOT / "docs" / "quantization.md"


def test_quality_runs(tmp_path, monkeypatch, capsys):
    folder, out = tmp_path / "text", tmp_path / "found.json"
    texts = ["the quick brown fox jumps over the lazy dog " * 20 + str(i) for i in range(20)]
    prepare(texts, folder, ByteTokenizer(), val_fraction=0.3)
    monkeypatch.setattr(quantized_quality, "standard_library", lambda work: folder)
    threads = torch.get_num_threads()
    main(["--quick", "--out", str(out), "--work", str(tmp_path)])
    torch.set_num_threads(threads)
    found = load(out)
    for part in (found["text"], found["chains"]):
        assert list(part["kinds"]) == list(KINDS)
        errors = [each["state_error"][-1] for each in part["kinds"].values()]
        assert 0 < errors[0] <= errors[1] < min(errors[2:]) < 0.2
        for each in part["kinds"].values():
            assert len(each["score"]) == len(each["step_error"]) == len(part["loops"]) == 3
            # a step from the exact state is the first step of a loop with exact input
            assert each["step_error"][0] == each["loop_error"][0]
    assert out.with_suffix(".png").stat().st_size > 1000
    assert quantized_quality.markdown(found) in capsys.readouterr().out
    assert str(tmp_path) not in out.read_text()


def test_quick_must_not_overwrite_the_recorded_results():
    with pytest.raises(SystemExit):
        main(["--quick"])


def test_timing_requires_equal_results(monkeypatch):
    def never(*_, **__):
        raise AssertionError("timed")

    def broken(model, group):
        twin = quantized_twin(model, group)
        with torch.no_grad():
            twin.recurrent.blocks[0].ffn.down.mul_(1.2)
        return twin

    quantized_twin = quantized.rounded_twin
    monkeypatch.setattr(quantized, "rounded_twin", broken)
    monkeypatch.setattr(quantized, "compare", never)
    with pytest.raises(GateError, match="off by"):
        next(quantized.rows(QUICK))


def test_the_recorded_results_are_those_of_this_measurement():
    recorded = load(STUDY.results)
    assert recorded["scale"] == json.loads(json.dumps(asdict(FULL)))
    assert STUDY.picture.exists()


@pytest.mark.parametrize("part", [quantized_quality.markdown, quantized_quality.verdict])
def test_the_page_shows_the_recorded_results(part):
    assert part(load(STUDY.results)) in PAGE.read_text(encoding="utf-8")


def test_the_findings_of_the_page_follow_from_the_results():
    found = load(STUDY.results)
    for part in (found["text"], found["chains"]):
        kinds = part["kinds"]
        for each in kinds.values():
            ratios = [a / b for a, b in zip(each["loop_error"], each["step_error"], strict=True)]
            assert max(ratios) < 2.2
            assert max(each["state_error"]) < 1.3 * each["state_error"][0]
        coarse, fine = (kinds[f"int4, groups of {n}"]["state_error"][-1] for n in (128, 32))
        assert 1.2 < coarse / fine < 1.35
    for name in KINDS:
        text, chains = (
            [a - b for a, b in zip(part["kinds"][name]["score"], part["float32"]["score"],
                                   strict=True)]
            for part in (found["text"], found["chains"])
        )  # fmt: skip
        assert max(map(abs, text)) < (0.004 if "int4" in name else 0.0015)
        assert max(chains[8:14]) < (0.07 if "128" in name else 0.035)
        assert max(chains[15:]) < 0.01
        assert "int4" not in name or max(chains[8:14]) > 0.025
