"""Loggers by name, with stand-ins that have the packages' interfaces; and the metrics they get."""

from __future__ import annotations

import json
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import random_ids, small_model

from open_mythos import LoopTrace
from open_mythos.errors import ConfigError, EnvironmentError_, InternalError
from open_mythos.model.trace import load_entropy, token_correlation
from open_mythos.train.loop_summary import LoopSummary, depth_metrics
from open_mythos.train.monitoring.loggers import (
    IDENTITY_FILE,
    LOGGERS,
    LoggedRun,
    TensorBoardLogger,
    flat_metrics,
    open_loggers,
)
from open_mythos.train.monitoring.metrics import EVENTS, LoggerGroup, event

ALARM = {"name": "state_collapse", "what": "all alike", "fix": "wait", "step": 20}
LINE = {
    "loss": 2.5, "state_norm": [1.0, 2.0], "depth_histogram": [3, 4], "alarms": [ALARM],
    "router_share/layer1": [[0.5, 0.5]], "event": {"kind": "resumed"},
}  # fmt: skip
NUMBERS = {
    "loss": 2.5, "state_norm/loop01": 1.0, "state_norm/loop02": 2.0, "alarm/state_collapse": 1.0,
}  # fmt: skip


class Calls:
    """Writes down what is called on it."""

    def __init__(self, made: list) -> None:
        self.made = made

    def __getattr__(self, name: str):
        def call(*given, **named):
            self.made.append((name, given, named))
            return self

        return call


@pytest.fixture
def made() -> list:
    """What was called on the stand-ins."""
    return []


@pytest.fixture
def run(tmp_path) -> LoggedRun:
    return LoggedRun(tmp_path / "run", "looped", {"train": {"steps": 3}})


@pytest.fixture
def packages(monkeypatch, made):
    """Stand-ins for all three packages."""
    for name in ("tensorboard", "wandb", "trackio"):
        module = ModuleType(name)
        module.init = Calls(made).init
        monkeypatch.setitem(sys.modules, name, module)
    board = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = lambda *given, **named: Calls(made).SummaryWriter(*given, **named)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)


def calls(made: list, name: str) -> list:
    return [(given, named) for called, given, named in made if called == name]


def test_numbers_get_names_of_their_own():
    rows = [{"depth": 4, "loss": 1.5, "bits_per_byte": None}, {"depth": 16, "loss": 1.25}]
    dense = [{"depth": None, "loss": 1.75}]
    assert flat_metrics(LINE) == NUMBERS
    assert flat_metrics({"eval/depths": rows, "note": "text", "on": True}) == {
        "eval/loss/depth04": 1.5, "eval/loss/depth16": 1.25,
    }  # fmt: skip
    assert flat_metrics({"eval/depths": dense}) == {"eval/loss": 1.75}


def test_tensorboard(packages, made, run):
    (log,) = open_loggers(["tensorboard"], run)
    assert made == []
    log.log(10, {"loss": 3.0})
    log.log(20, LINE)
    log.log(20, {"eval/loss": 1.0})
    log.log(10, {"loss": 2.0})  # the run went back to an older checkpoint
    opened = [named["purge_step"] for _, named in calls(made, "SummaryWriter")]
    assert opened == [10, 10]
    assert calls(made, "SummaryWriter")[0][0] == (str(run.folder / "tensorboard"),)
    scalars = [given for given, _ in calls(made, "add_scalar")]
    assert scalars == [
        ("loss", 3.0, 10), *((*pair, 20) for pair in NUMBERS.items()), ("eval/loss", 1.0, 20),
        ("loss", 2.0, 10),
    ]  # fmt: skip
    ((text, _),) = calls(made, "add_text")
    assert text == ("alarm/state_collapse", "all alike: wait", 20)
    assert len(calls(made, "flush")) == 4, "a killed run loses nothing"
    log.close()
    assert len(calls(made, "close")) == 2


def test_wandb(packages, made, run):
    (log,) = open_loggers(["wandb"], run)
    ((_, opened),) = calls(made, "init")
    assert (opened["project"], opened["config"], opened["resume"]) == (
        "looped", {"train": {"steps": 3}}, "allow",
    )  # fmt: skip
    assert opened["id"].startswith("run-")
    assert calls(made, "define_metric") == [(("*",), {"step_metric": "step"})]
    log.log(20, LINE)
    assert calls(made, "log") == [(({"step": 20, **NUMBERS},), {})]
    ((_, alert),) = calls(made, "alert")
    assert alert["title"] == "state_collapse"
    log.close()
    assert len(calls(made, "finish")) == 1


def test_trackio(packages, made, run):
    (log,) = open_loggers(["trackio"], run)
    ((_, opened),) = calls(made, "init")
    assert (opened["project"], opened["resume"]) == ("looped", "allow")
    log.log(20, LINE)
    assert calls(made, "log") == [((NUMBERS,), {"step": 20})]
    log.close()
    assert len(calls(made, "finish")) == 1


def test_a_resumed_run_keeps_its_name_and_another_has_another(packages, made, run, tmp_path):
    for folder in (run.folder, run.folder, tmp_path / "other"):
        open_loggers(["wandb"], LoggedRun(folder, "looped", {}))
    first, again, other = (named["id"] for _, named in calls(made, "init"))
    assert first == again != other
    (run.folder / IDENTITY_FILE).write_text("{")
    with pytest.raises(EnvironmentError_, match=IDENTITY_FILE):
        open_loggers(["trackio"], run)


@pytest.mark.parametrize("name", LOGGERS)
def test_a_missing_package_is_named_before_anything_is_opened(name, monkeypatch, run):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EnvironmentError_) as caught:
        open_loggers([name], run)
    error = caught.value
    assert error.fix == f"pip install {name}"
    assert all((error.what, error.where, error.value, error.allowed))
    assert not run.folder.exists()


def test_an_unknown_name_is_refused(run):
    with pytest.raises(ConfigError) as caught:
        open_loggers(["tensorbord"], run)
    assert "tensorboard" in caught.value.fix
    assert caught.value.allowed == "tensorboard, wandb, trackio"


def test_a_service_that_refuses_is_explained(packages, monkeypatch, run):
    def refuse(**_):
        raise ValueError("no api key")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(EnvironmentError_, match="no api key") as caught:
        open_loggers(["wandb"], run)
    assert "wandb login" in caught.value.fix


def test_other_ranks_open_nothing(packages, made, monkeypatch, run):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    assert open_loggers(["wandb", "trackio"], run) == []
    assert made == []


def test_the_real_tensorboard_reads_it(run):
    """Where the package is installed."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in ((10, 20, 30), (20, 30)):
        log = TensorBoardLogger(run)
        for step in steps:
            log.log(step, {"loss": float(len(steps))})
        log.close()
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, 3.0), (20, 2.0), (30, 2.0)]


def test_closing_survives_failures(caplog):
    def refuse():
        raise OSError("gone")

    closed = []
    bad = SimpleNamespace(log=lambda *_: None, close=refuse)
    good = SimpleNamespace(log=lambda *_: None, close=lambda: closed.append(True))
    plain = SimpleNamespace(log=lambda *_: None)
    with caplog.at_level(logging.WARNING):
        LoggerGroup([bad, plain, good]).close()
    assert closed == [True]
    assert "gone" in caplog.text


# what is measured


def test_correlation_is_the_mean_cosine_of_pairs():
    h_BTD = torch.randn(3, 5, 8)
    real_BT = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 1, 0, 0]], dtype=torch.bool)
    for mask in (None, real_BT):
        expected = []
        for row in range(3):
            states = h_BTD[row] if mask is None else h_BTD[row, mask[row]]
            cosines = torch.cosine_similarity(states[:, None], states[None], dim=-1)
            n = len(states)
            expected.append((cosines.sum() - n) / max(1, n * (n - 1)))
        found = token_correlation(h_BTD, mask)
        torch.testing.assert_close(found, torch.stack(expected), atol=1e-6, rtol=1e-5)


def test_correlation_of_extremes():
    one = torch.randn(1, 1, 8)
    lengths = torch.rand(1, 6, 1) + 0.1
    assert token_correlation(one * lengths).item() == pytest.approx(1)
    assert token_correlation(torch.eye(6).unsqueeze(0)).item() == pytest.approx(0, abs=1e-6)
    assert token_correlation(torch.stack((one[0, 0], -one[0, 0])).unsqueeze(0)) == pytest.approx(-1)
    assert token_correlation(one).item() == 0
    assert token_correlation(torch.zeros(1, 4, 8)).item() == 0
    assert token_correlation(torch.full((1, 4, 8), torch.nan)).isnan().all()


def test_correlation_is_measured_only_when_asked_for():
    model, ids = small_model(), random_ids(3, 7)
    plain, asked = LoopTrace(), LoopTrace(keep_correlation=True, keep_states=True)
    torch.testing.assert_close(model(ids, 4, trace=asked), model(ids, 4, trace=plain))
    assert not plain.correlation
    for loop in range(4):
        assert torch.equal(asked.correlation[loop], token_correlation(asked.states[loop]))
    assert "token_correlation" in LoopSummary.of(asked).metrics()
    assert "token_correlation" not in LoopSummary.of(plain).metrics()


def test_summaries_of_micro_batches_are_those_of_the_whole_batch():
    """Although the parts run unequal numbers of loops."""
    model, ids = small_model(), random_ids(4, 7)
    depths = [1, 3, 2, 5]
    whole, merged = LoopTrace(keep_correlation=True), LoopTrace()
    model(ids, depths, trace=whole)
    for rows in (slice(0, 2), slice(2, 4)):
        part = LoopTrace(keep_correlation=True)
        model(ids[rows], depths[rows], trace=part)
        merged.add(part)
    expected, found = LoopSummary.of(whole), LoopSummary.of(merged)
    assert found.rows == expected.rows == [4, 3, 2, 1, 1]
    for name, means in expected.means.items():
        assert found.means[name] == pytest.approx(means, rel=1e-4, abs=1e-5)
    for layer, load in expected.load.items():
        assert torch.equal(found.load[layer], load)
    assert found.metrics(detail=True).keys() == expected.metrics(detail=True).keys()


def test_routing_summary():
    trace = LoopTrace(
        state_norm={0: torch.ones(2), 1: torch.ones(2)},
        delta_norm={0: torch.ones(2), 1: torch.ones(2)},
        load={(3, 0): torch.tensor([1.0, 3.0]), (3, 1): torch.tensor([4.0, 0.0])},
    )
    metrics = LoopSummary.of(trace).metrics(detail=True)
    assert metrics["router_min/layer3"] == [0.25, 0.0]
    assert metrics["router_max/layer3"] == [0.75, 1.0]
    assert metrics["router_share/layer3"] == [[0.25, 0.75], [1.0, 0.0]]
    assert metrics["router_entropy/layer3"] == pytest.approx([0.8113, 0.0], abs=1e-4)
    assert "router_share/layer3" not in LoopSummary.of(trace).metrics()
    assert LoopSummary.of(trace).expert_share(3) == [0.625, 0.375]
    assert load_entropy(torch.zeros(1, 4)).tolist() == [0.0]
    json.dumps(metrics)


def test_nothing_measured_is_nothing_logged():
    assert LoopSummary.of(LoopTrace()).metrics() == {}


def test_depths_that_ran():
    found = depth_metrics(torch.tensor([1, 3, 3, 5]))
    assert found == {"mean_depth": 3.0, "max_depth": 5, "depth_histogram": [1, 0, 2, 0, 1]}


def test_events_have_known_kinds():
    assert event("rewound", from_step=30, to_step=20) == {
        "event": {"kind": "rewound", "from_step": 30, "to_step": 20}
    }
    assert all(event(kind) for kind in EVENTS)
    with pytest.raises(InternalError):
        event("teleported")
