"""The command: what it refuses, where results go, what recording writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import listing, report, table
from experiments.__main__ import main
from experiments.cell_pool import CellsFailedError
from experiments.run import run_claim
from open_mythos.errors import ConfigError


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A source checkout with no results yet."""
    package = tmp_path / "checkout" / "experiments"
    package.mkdir(parents=True)
    (tmp_path / "checkout" / "docs").mkdir()
    (tmp_path / "checkout" / "pyproject.toml").touch()
    monkeypatch.setattr(table, "PACKAGE", package)
    monkeypatch.setattr(report, "PACKAGE", package)
    return tmp_path / "checkout"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"claim": "c99"}, "unknown claim"),
        ({"claim": "toy", "scale": "gpu"}, "no such scale"),
        ({"claim": "toy", "record": True, "quick": True}, "--quick"),
        ({"claim": "toy", "record": True, "out": "here"}, "--out here"),
        ({"claim": "toy", "workers": -1}, "--workers"),
    ],
)
def test_refusals(toy, tmp_path, options, said):
    with pytest.raises(ConfigError, match=said):
        run_claim(**options)
    assert toy.ran == []
    assert not list(tmp_path.iterdir()), "nothing may be left behind"


def test_an_installed_package_records_nothing(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PACKAGE", tmp_path / "site-packages" / "experiments")
    with pytest.raises(ConfigError, match="source checkout"):
        run_claim("toy", record=True)
    assert toy.ran == []


def test_results_and_verdict(toy, tmp_path, capsys):
    assert main(["run", "toy", "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "holds" in printed
    assert "They did." in printed
    assert "pass mark: all doubled" in printed
    folder = tmp_path / "runs" / "experiments" / "toy" / "cpu"
    assert len(list(folder.glob("*.json"))) == 3
    assert (folder / "toy.png").exists()
    run_claim("toy", workers=1, out="there", quiet=True)
    assert len(list((tmp_path / "there").glob("*.json"))) == 3
    assert toy.ran == [0, 1, 2, 0, 1, 2]


def test_fresh_reruns_everything(toy):
    run_claim("toy", workers=1, quiet=True)
    toy.factor = 5
    with pytest.raises(ConfigError):
        run_claim("toy", workers=1, quiet=True)
    run_claim("toy", workers=1, quiet=True, fresh=True)
    record = json.loads(Path("runs/experiments/toy/cpu/double-seed2.json").read_text())
    assert record["figures"]["doubled"] == 10


def test_fresh_discards_checkpoints(toy):
    def fail(cell):
        raise ValueError

    toy.misbehave = fail
    with pytest.raises(CellsFailedError):
        run_claim("toy", workers=1, quiet=True)
    toy.misbehave = lambda cell: None
    run_claim("toy", workers=1, quiet=True, fresh=True)  # the toy refuses a folder that is there


def test_quick_gives_no_verdict(toy, capsys):
    run_claim("toy", quick=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert "no verdict" in printed
    assert "They did." not in printed
    run_claim("toy", quick=True)
    assert toy.ran == [0, 1, 2, 0, 1, 2]


def test_recording_renews_page_and_picture(toy, checkout):
    run_claim("toy", record=True, workers=1, quiet=True)
    results = checkout / "experiments" / "toy" / "results" / "cpu"
    assert len(list(results.glob("*.json"))) == 3
    page = (checkout / "docs" / "claims.md").read_text(encoding="utf-8")
    assert "**Holds** (cpu). They did." in page
    assert "| all | 0 2 4 |" in page
    assert r"0\|2\|4" in page, "a bar may not split a cell"
    assert "![a toy](claims/toy.png)" in page
    assert (checkout / "docs" / "claims" / "toy.png").read_bytes() == b"a picture"


def test_a_part_of_the_cells_is_no_answer(toy, checkout):
    run_claim("toy", record=True, workers=1, quiet=True)
    (line,) = (line for line in listing.lines() if line.claim == "toy")
    assert line.verdicts == {"cpu": "holds"}
    assert line.missing == ""
    table.committed_results("toy", "cpu").joinpath("double-seed0.json").unlink()
    (line,) = (line for line in listing.lines() if line.claim == "toy")
    assert line.verdicts == {}
    assert line.missing == "cpu: not run, needs anything for about 0.1 minutes"


def test_the_list_has_every_claim(toy, checkout, capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for claim in table.CLAIMS:
        assert f"{claim} " in printed
    assert toy.ran == []


def test_the_list_is_in_order():
    numbers = [line.claim for line in listing.lines()]
    assert numbers.index("c2") < numbers.index("c9") < numbers.index("c10")
