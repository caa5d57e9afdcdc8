"""The sweep runs at a tiny size, resumes after an interruption, and matches the documentation."""

import json
import math

import pytest

from experiments.studies import lr_transfer
from experiments.studies.common import ROOT, load
from experiments.studies.lr_transfer import FULL, QUICK, STUDY, Best, bests, cells, exponent, main
from open_mythos.data import prepare
from open_mythos.tokenizer import ByteTokenizer

PAGE = ROOT / "docs" / "optimizers.md"


@pytest.fixture
def small_text(tmp_path, monkeypatch):
    """A page instead of the standard library."""
    folder = tmp_path / "text"
    texts = ["the quick brown fox jumps over the lazy dog " * 20 + str(i) for i in range(40)]
    prepare(texts, folder, ByteTokenizer(), val_fraction=0.3)
    monkeypatch.setattr(lr_transfer, "standard_library", lambda work: folder)


def test_an_interrupted_sweep_resumes(tmp_path, small_text, monkeypatch, capsys):
    out, measured = tmp_path / "found.json", []
    measure = lr_transfer.measure

    def counted(cell, scale, text):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(cell.name)
        return measure(cell, scale, text)

    monkeypatch.setattr(lr_transfer, "measure", counted)
    arguments = ["--quick", "--out", str(out), "--work", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    first = load(out)["cells"]
    assert list(first) == measured
    monkeypatch.setattr(lr_transfer, "measure", measure)
    main(arguments)
    found = load(out)
    assert list(found["cells"]) == [cell.name for cell in cells(QUICK)]
    assert {name: found["cells"][name] for name in measured} == first
    for cell in found["cells"].values():
        for when in ("halfway", "end", "halfway_averaged", "end_averaged"):
            assert 1 < cell[when] < 7  # untrained: log 320 = 5.8
        assert cell["end"] != cell["halfway"] != cell["halfway_averaged"]
    assert out.with_suffix(".png").stat().st_size > 1000
    assert str(tmp_path) not in out.read_text()
    assert lr_transfer.markdown(found) in capsys.readouterr().out


def test_results_of_another_scale_are_rejected(tmp_path):
    out = tmp_path / "found.json"
    out.write_text(json.dumps({"scale": {"widths": [1]}, "cells": {}}))
    with pytest.raises(SystemExit, match="results of another scale"):
        list(lr_transfer.sweep(QUICK, out, tmp_path))


def test_quick_must_not_overwrite_the_recorded_results():
    with pytest.raises(SystemExit):
        main(["--quick"])


def made_up(loss_of, rates=(0.001, 0.002, 0.004, 0.008), widths=(32, 64, 128)):
    """Findings of a known law."""
    found = {}
    for width in widths:
        for lr in rates:
            cell = {"optimizer": "adamw", "width": width, "loops": 2, "lr": lr}
            found[f"{width}-{lr}"] = cell | {"end": loss_of(width, lr)}
    return {"cells": found}


def test_the_lowest_point_of_a_parabola_is_found():
    found = made_up(lambda width, lr: 2 + math.log(lr / 0.0027 / (width / 64) ** -0.5) ** 2)
    rates = [best.lr for best in bests(found)]
    assert rates == pytest.approx([0.0027 * 2**0.5, 0.0027, 0.0027 / 2**0.5])
    assert exponent(bests(found)) == pytest.approx(-0.5)
    assert not any(best.at_edge for best in bests(found))


def test_edges_and_divergence_are_reported():
    rising = bests(made_up(lambda width, lr: lr))[0]
    assert (rising.lr, rising.at_edge) == (0.001, True)
    diverged = bests(made_up(lambda width, lr: None if lr > 0.002 else -lr))[0]
    assert (diverged.lr, diverged.at_edge) == (0.002, False)
    found = made_up(lambda width, lr: None if lr > 0.003 and width > 64 else abs(lr - 0.004))
    assert "diverged" in lr_transfer.markdown(found)


def test_the_table_shows_the_cost_of_transfer():
    found = made_up(lambda width, lr: 2 + abs(math.log2(lr * width / 0.128)))
    *_, last = lr_transfer.markdown(found).splitlines()
    assert last == "| AdamW | 128 | 2 | 0.0010 (edge of the grid) | 2.000 | +2.000 |"


def test_the_verdict_says_what_changes():
    found = {}
    for optimizer, factor in (("adamw", 1), ("muon", 4)):
        for width, loops in ((32, 2), (128, 2), (64, 2), (64, 8)):
            for lr in (0.001, 0.002, 0.004, 0.008, 0.016, 0.032):
                off = math.log2(lr / (0.004 * factor * (32 / width) ** 0.5))
                cell = {"optimizer": optimizer, "width": width, "loops": loops, "lr": lr,
                        "end": 2 / factor + off**2, "cpu_seconds": float(factor)}  # fmt: skip
                found[f"{optimizer}-{width}-{loops}-{lr}"] = cell
    adamw, muon, both = lr_transfer.verdict({"cells": found}).splitlines()
    assert "from width 32 to 128 the best learning rate falls by a factor of 2.0" in adamw
    assert "as width^-0.50; from 2 to 8 loops it rises by a factor of 1.0." in muon
    assert "4.0 to 4.0 times that of AdamW" in both
    assert "4.00 times as much" in both


@pytest.mark.parametrize("part", [lr_transfer.markdown, lr_transfer.verdict, lr_transfer.averaging])
def test_the_page_shows_the_recorded_results(part):
    assert part(load(STUDY.results)) in PAGE.read_text(encoding="utf-8")


def test_the_rule_of_the_page_follows_from_the_results():
    """lr ~ width^-0.7, and Muon's rate four times AdamW's."""
    rows = {(b.optimizer, b.width, b.loops): b for b in bests(load(STUDY.results))}
    wide = {name: [rows[name, width, 2] for width in FULL.widths] for name in FULL.rates}
    assert sum(map(exponent, wide.values())) / 2 == pytest.approx(-0.7, abs=0.05)
    ratios = [rows["muon", *key].lr / b.lr for (name, *key), b in rows.items() if name == "adamw"]
    assert math.prod(ratios) ** (1 / len(ratios)) == pytest.approx(4, rel=0.15)
    assert {"^0.7", "four times"} <= {w for w in ("^0.7", "four times") if w in PAGE.read_text()}


def test_the_recorded_results_are_those_of_this_sweep():
    recorded = load(STUDY.results)
    assert recorded["scale"] == json.loads(json.dumps(lr_transfer.asdict(FULL)))
    assert list(recorded["cells"]) == [cell.name for cell in cells(FULL)]
    assert STUDY.picture.exists()
    assert len(bests(recorded)) == len({(b.optimizer, b.width, b.loops) for b in bests(recorded)})
    assert all(isinstance(best, Best) for best in bests(recorded))
