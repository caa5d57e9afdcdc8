"""Cells are run once, recorded at once, and never recorded when they did not finish."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import cell_pool
from experiments.cell_pool import CellsFailedError, Job, attempt, run_cells
from experiments.claim import Cell, Place
from experiments.results import Results, plain
from experiments.table import experiment
from open_mythos.errors import ConfigError, DataError, EnvironmentError_


def run(toy: Any, folder: Path, **options: Any) -> list[Any]:
    cells = toy.cells("cpu")
    options = {"workers": 1, "quiet": True} | options
    return run_cells("toy", "cpu", cells, Results(folder / "out"), folder / "work", **options)


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "out").iterdir()}


def test_finished_cells_are_not_run_again(toy, tmp_path):
    first = run(toy, tmp_path)
    assert [record.figures["doubled"] for record in first] == [0, 2, 4]
    assert run(toy, tmp_path) == first
    assert toy.ran == [0, 1, 2]
    (tmp_path / "out" / "double-seed1.json").unlink()
    run(toy, tmp_path)
    assert toy.ran == [0, 1, 2, 1]


def test_a_record_says_where_it_comes_from(toy, tmp_path):
    record = run(toy, tmp_path)[2]
    assert (record.claim, record.scale, record.arm, record.seed) == ("toy", "cpu", "double", 2)
    assert torch.__version__ in record.versions
    assert "1 at a time" in record.machine
    assert record.seconds >= 0
    assert record.figures["infinite"] is None


def test_a_failed_cell_is_not_recorded_and_the_others_are(toy, tmp_path):
    def fail(cell: Cell) -> None:
        if cell.seed == 1:
            raise ZeroDivisionError("of its own")

    toy.misbehave = fail
    with pytest.raises(CellsFailedError, match=r"1 of 3.*\n.*double-seed1.*\n.*of its own"):
        run(toy, tmp_path)
    assert names(tmp_path) == {"double-seed0.json", "double-seed2.json"}
    toy.misbehave = lambda cell: None
    (tmp_path / "work" / "unfinished" / "toy-cpu-double-seed1").rmdir()
    assert len(run(toy, tmp_path)) == 3
    assert toy.ran == [0, 1, 2, 1]


def test_interrupting_keeps_what_is_finished(toy, tmp_path):
    def interrupt(cell: Cell) -> None:
        if cell.seed == 1:
            raise KeyboardInterrupt

    toy.misbehave = interrupt
    with pytest.raises(KeyboardInterrupt):
        run(toy, tmp_path)
    assert names(tmp_path) == {"double-seed0.json"}


def test_only_an_unfinished_cell_keeps_its_folder(toy, tmp_path):
    def fail(cell: Cell) -> None:
        if cell.seed == 2:
            raise ValueError

    toy.misbehave = fail
    with pytest.raises(CellsFailedError):
        run(toy, tmp_path)
    kept = [path.name for path in (tmp_path / "work" / "unfinished").iterdir()]
    assert kept == ["toy-cpu-double-seed2"]


def test_changed_settings_are_refused(toy, tmp_path):
    run(toy, tmp_path)
    toy.factor = 3
    with pytest.raises(ConfigError, match=r"factor(.|\n)*--fresh"):
        run(toy, tmp_path)
    assert toy.ran == [0, 1, 2]


@pytest.mark.parametrize("content", ["", "{}", '{"claim": 1}', "[1, 2]", "nonsense"])
def test_a_damaged_record_is_named(toy, tmp_path, content):
    run(toy, tmp_path)
    path = tmp_path / "out" / "double-seed1.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"double-seed1\.json"):
        run(toy, tmp_path)


def test_a_record_appears_whole_or_not_at_all(toy, tmp_path, monkeypatch):
    def full(source: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(EnvironmentError_, match="no space left"):
        run(toy, tmp_path)
    assert not list((tmp_path / "out").glob("*.json"))


def test_clearing_deletes_records_alone(toy, tmp_path):
    run(toy, tmp_path)
    (tmp_path / "out" / "notes.json").write_text("mine")
    Results(tmp_path / "out").clear()
    assert names(tmp_path) == {"notes.json"}


def test_settings_are_compared_as_json_has_them():
    assert plain({"a": (1, 2.5), 3: float("nan")}) == {"a": [1, 2.5], "3": None}


def test_threads_are_shared_and_given_back(toy, tmp_path):
    seen = []
    toy.misbehave = lambda cell: seen.append(torch.get_num_threads())
    before = torch.get_num_threads()
    place = Place(tmp_path, tmp_path / "models", tmp_path / "own")
    outcome = attempt(Job("toy", "cpu", toy.cells("cpu")[0], place, before + 1, workers=1))
    assert outcome.record is not None
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("cores", "workers", "expected"), [(8, 0, (3, 2)), (8, 2, (2, 4)),
                                                            (2, 4, (3, 1))])  # fmt: skip
def test_workers_and_threads_fit_the_cores(
    toy, tmp_path, monkeypatch, cores, workers, expected
):  # fmt: skip
    """Three cells: never more workers than cells, and each with its share of the cores."""
    jobs = []

    def note(given, at_once):
        jobs.extend(given)
        yield from ((job, attempt(job)) for job in given)

    monkeypatch.setattr(cell_pool.machine, "cores", lambda: cores)
    monkeypatch.setattr(cell_pool, "_outcomes", note)
    run(toy, tmp_path, workers=workers)
    assert {(job.workers, job.threads) for job in jobs} == {expected}


class Deadly:
    """Unpickling it ends the process, as a kill would."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (9,)


@pytest.mark.slow
def test_a_killed_worker_records_nothing(tmp_path):
    results = Results(tmp_path / "out")
    cells = [Cell("deadly", seed, {"model": Deadly()}) for seed in range(2)]
    with pytest.raises(EnvironmentError_, match="worker process died"):
        run_cells("c6", "quick", cells, results, tmp_path, workers=2, quiet=True)
    assert not results.folder.exists()


@pytest.mark.slow
def test_processes_find_what_one_process_finds(tmp_path):
    cells = experiment("c6").cells("quick")
    found = [
        run_cells("c6", "quick", cells, Results(tmp_path / str(n)), tmp_path, workers=n, quiet=True)
        for n in (1, 2)
    ]
    alone, together = ({record.arm: record.figures for record in each} for each in found)
    assert together["counted"] == alone["counted"]
    # as many threads as workers leave: the last digits of the logits differ
    assert together["mla"]["bytes"] == alone["mla"]["bytes"]
    assert together["mla"]["deviation"] == pytest.approx(alone["mla"]["deviation"], rel=1e-4)
