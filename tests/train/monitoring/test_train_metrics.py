"""Metrics: JSON lines, loggers that fail, sums over micro-batches."""

import json
import logging
import math

import pytest
import torch

from open_mythos import LoopTrace
from open_mythos.errors import EnvironmentError_
from open_mythos.train import JsonlLogger
from open_mythos.train.loop_summary import LoopSummary
from open_mythos.train.monitoring.metrics import LoggerGroup


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_line_a_call(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    log = JsonlLogger(path)
    log.log(1, {"loss": 2.5, "state_norm": [1.0, 2.0]})
    log.log(2, {"loss": 2.0})
    assert read(path) == [
        {"step": 1, "loss": 2.5, "state_norm": [1.0, 2.0]},
        {"step": 2, "loss": 2.0},
    ]


def test_appends_after_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    JsonlLogger(path).log(2, {"loss": 1.0})
    JsonlLogger(path).log(3, {})
    lines = path.read_text().splitlines()
    assert lines == ['{"step": 1}', '{"step": 2, "lo', '{"step": 2, "loss": 1.0}', '{"step": 3}']


def test_what_is_not_finite_becomes_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonlLogger(path).log(1, {"loss": math.nan, "norms": [1.0, {"x": math.inf}]})
    assert read(path) == [{"step": 1, "loss": None, "norms": [1.0, {"x": None}]}]


def test_an_impossible_place_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentError_, match="file"):
        JsonlLogger(tmp_path / "file" / "metrics.jsonl")


class Recorder:
    def __init__(self, fails=False):
        self.steps, self.fails = [], fails

    def log(self, step, metrics):
        if self.fails:
            raise OSError("no space left")
        self.steps.append(step)


def test_a_failing_logger_warns_once_and_stops_nobody(caplog):
    good, bad = Recorder(), Recorder(fails=True)
    group = LoggerGroup([bad, good])
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            group.log(step, {})
    assert good.steps == [0, 1, 2]
    assert [record.message for record in caplog.records] == [
        "Recorder failed at step 0 and may lose metrics: no space left"
    ]


def test_only_the_first_rank_logs(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    for rank in (1, 0):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        LoggerGroup([recorder]).log(rank, {})
    assert recorder.steps == [0]


def test_merging_weighs_rows_and_adds_loads():
    first = LoopTrace(
        state_norm={0: torch.tensor([1.0, 3.0]), 1: torch.tensor([5.0])},
        delta_norm={0: torch.tensor([1.0, 1.0]), 1: torch.tensor([1.0])},
        load={(1, 0): torch.tensor([4.0, 0.0]), (1, 1): torch.tensor([2.0, 0.0])},
    )
    second = LoopTrace(
        state_norm={0: torch.tensor([8.0])},
        delta_norm={0: torch.tensor([4.0])},
        load={(1, 0): torch.tensor([0.0, 4.0])},
    )
    total = LoopTrace()
    total.add(first)
    total.add(second)
    metrics = LoopSummary.of(total).metrics()
    assert metrics["state_norm"] == [4.0, 5.0]
    assert metrics["delta_norm"] == [2.0, 1.0]
    assert metrics["router_entropy/layer1"] == pytest.approx([1.0, 0.0])
    assert torch.equal(total.load_by_layer()[1], torch.tensor([6.0, 4.0]))
    assert torch.equal(first.load[1, 0], torch.tensor([4.0, 0.0]))
