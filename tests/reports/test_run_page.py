"""Reports match the run's folder, handle missing parts and escape all content."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from helpers import small_config, small_model

from open_mythos import DenseTransformer, save_pretrained
from open_mythos.cli.pages import report
from open_mythos.errors import DataError, EnvironmentError_
from open_mythos.reports.run_page import page
from open_mythos.reports.run_record import Alarm, read_run
from open_mythos.run_folder import VALIDATED_DEPTHS
from open_mythos.train import DepthConfig, RunConfig, TrainConfig
from open_mythos.train.monitoring.validated import depth_record
from tests.reports.html_reader import HOSTILE, Reader, assert_self_contained

ALARM = {"name": "state_collapse", "what": "all alike", "fix": "wait", "loop": 2}
ROWS = [
    {"depth": depth, "loss": loss, "bits_per_byte": loss / 2}
    for depth, loss in ((1, 3.0), (2, 2.5), (4, 2.0), (8, 2.02), (16, 2.4))
]


def line(step: int, **changes) -> dict:
    """Return the metrics of a step with two loops and four experts."""
    return {
        "step": step, "loss": 4.0 - step / 100, "lr": 0.001, "grad_norm": 1.5, "skipped": 0,
        "tokens": 64 * step, "tokens_per_second": 640.0, "rho": 0.45, "mean_depth": 1.5,
        "depth_histogram": [4, 4], "state_norm": [1.0, 1.5], "delta_norm": [1.0, 0.25],
        "token_correlation": [0.1, 0.2], "router_entropy/layer1": [0.9, 0.8],
        "router_share/layer1": [[0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]],
    } | changes  # fmt: skip


def write_lines(folder: Path, lines: list) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def write_config(folder: Path, **train) -> RunConfig:
    config = RunConfig(
        model=small_config(), depth=DepthConfig(mean=4.0),
        train=TrainConfig(steps=100, seq_len=16, **train),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(config.to_dict()))
    return config


def write_checkpoint(folder: Path, step: int, model, state: dict) -> Path:
    path = folder / "checkpoints" / f"step_{step:08d}"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_pretrained(model, path)
    (path / "state.json").write_text(json.dumps(state))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A complete run with a rollback and an alarm."""
    folder = tmp_path_factory.mktemp("runs") / "whole run"
    config = write_config(folder)
    lines = [line(step) for step in (10, 20, 30)]
    lines += [
        {"step": 30, "event": {"kind": "rewound", "to": 20, "why": "the loss rose"}},
        *(line(step) for step in (30, 40)),
        {"step": 40, "eval/depths": [row | {"loss": row["loss"] + 1} for row in ROWS]},
        line(60, alarms=[ALARM]),
        {"step": 80, "event": {"kind": "skipped", "loss": None}},
        line(80, skipped=1, loss=None, grad_norm=None),
        line(100), {"step": 100, "eval/depths": ROWS},
    ]  # fmt: skip
    write_lines(folder, lines)
    state = {"config": config.to_dict(), VALIDATED_DEPTHS: depth_record(ROWS, 4.0)}
    write_checkpoint(folder, 100, small_model(), state)
    return folder


@pytest.fixture(scope="module")
def html(whole) -> str:
    return page(read_run(whole))


@pytest.fixture(scope="module")
def read(html) -> Reader:
    return Reader(html)


# reading


def test_the_record_matches_the_folder(whole):
    run = read_run(whole)
    assert list(run.steps) == [10, 20, 30, 40, 60, 80, 100]
    assert run.values("loss") == [(s, 4.0 - s / 100) for s in (10, 20, 30, 40, 60, 100)]
    (gap,) = [step for step, loss in run.curve("loss") if math.isnan(loss)]
    assert gap == 80
    assert run.alarms == [Alarm(60, "state_collapse", "all alike", "wait")]
    assert run.by_loop("delta_norm")[2] == [(s, 0.25) for s in run.steps]
    assert {step: len(rows) for step, rows in run.evaluations.items()} == {40: 5, 100: 5}
    kinds = [(event.step, event.kind) for event in run.events]
    assert kinds == [(30, "rewound"), (60, "alarm"), (80, "skipped")]
    assert run.events[0].text == "to: 20, why: the loss rose"
    assert (run.last_step, run.looped) == (100, True)
    assert (run.mean_depth, run.valid_range, run.loss_limit) == (4.0, (4, 8), 2.05)
    assert run.layers("router_share") == [1]


def test_decays_parameters_and_time(whole):
    run, model = read_run(whole), small_model()
    expected = model.recurrent.injection.coefficients()[0]
    assert run.checkpoint is not None
    assert run.checkpoint.decays == pytest.approx(sorted(expected.tolist()))
    counts = run.counts()
    assert counts is not None
    assert counts.parameters == sum(p.numel() for p in model.parameters())
    # 64 tokens per step at 640 per second: 100 steps, and steps 21 to 30 twice
    assert run.seconds == pytest.approx(11.0)


def test_resumes_with_and_without_an_event(tmp_path):
    folder = write_lines(tmp_path / "run", [line(s) for s in (10, 20, 30, 20, 30, 40)])
    run = read_run(folder)
    assert list(run.steps) == [10, 20, 30, 40]
    assert [(event.step, event.kind) for event in run.events] == [(20, "resumed")]
    logged = [line(10), line(20), {"step": 10, "event": {"kind": "resumed"}}, line(20)]
    run = read_run(write_lines(tmp_path / "logged", logged))
    assert list(run.steps) == [10, 20]
    assert [(event.step, event.kind) for event in run.events] == [(10, "resumed")]


def test_rolled_back_steps_are_dropped(tmp_path):
    """The run rolled back from step 50 to 20 and is at step 30."""
    lines = [line(s, loss=9.0) for s in (10, 20, 30, 40, 50)]
    rewound = {"step": 50, "event": {"kind": "rewound", "to": 20}}
    run = read_run(write_lines(tmp_path, [*lines, rewound, line(30, loss=1.0)]))
    assert run.curve("loss") == [(10, 9.0), (20, 9.0), (30, 1.0)]


def test_a_late_skip_event_drops_nothing(tmp_path):
    skipped = {"step": 10, "event": {"kind": "skipped"}}
    run = read_run(write_lines(tmp_path, [line(10), line(20), skipped, line(30)]))
    assert list(run.steps) == [10, 20, 30]
    assert [(event.step, event.kind) for event in run.events] == [(10, "skipped")]


# the page


def test_the_page_holds_every_part(read):
    for heading in (
        "whole run", "Alarms", "Learning", "Depth", "States in the loop", "Spectrum of A",
        "Routing", "Configuration", "Loss against depth", "Training depths", "Decays",
        "Layer 1: experts by loop", "Norm of the state",
    ):  # fmt: skip
        assert heading in read.text, heading
    assert "finished, 100 steps" in read.text
    assert "trained on 6,400 tokens in 11 s" in read.text
    assert "state_collapse, step 60" in read.text
    assert "all alike. What to do: wait." in read.text
    assert "4 – 8 loops, validated range" in read.text  # noqa: RUF001
    assert "1.000 validation bits per byte with 4 loops" in read.text
    assert "rolled back to an earlier checkpoint" in read.text
    assert read.tags["svg"] >= 11


def test_the_page_is_self_contained(html):
    assert_self_contained(html, scripts=0)


def test_changed_fields_are_bold(html):
    assert '<th>steps</th><td class="set">100<' in html
    assert "<th>schedule</th><td>cosine<" in html


def test_every_event_is_marked_in_every_curve(html):
    learning = html.partition("<h2>Learning</h2>")[2].partition("<h2>")[0]
    for kind in ("rewound", "alarm", "skipped"):
        assert learning.count(f'class="mark {kind}"') == learning.count("<svg") == 4
    assert "<title>step 60: alarm state_collapse</title>" in learning


def test_content_is_escaped(tmp_path):
    folder = write_lines(
        tmp_path / "run",
        [line(10, alarms=[ALARM | {"name": HOSTILE, "what": HOSTILE, "fix": HOSTILE}]),
         {"step": 10, "event": {"kind": HOSTILE, "why": HOSTILE, HOSTILE: 3}}],
    )  # fmt: skip
    config = write_config(folder).to_dict()
    config["data"]["path"], config["architecture"], config[HOSTILE] = HOSTILE, "looped", HOSTILE
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    read = Reader(page(read_run(folder)))
    assert not {"script", "img"} & set(read.tags)
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert HOSTILE.split("\u2028")[0] in read.text


# missing parts


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ([], "Nothing has been logged yet"),
        ([line(10)], "No evaluation yet"),
        ([line(10), '{"step": 20, "lo'], "1 line is not valid JSON"),
        ([{"step": 10, "loss": 2.0}], "No states were logged"),
        ([{"step": 10, "loss": None, "state_norm": [None, None]}], "No step has been logged"),
        ([line(10) | {"router_share/layer1": None}], "there were none yet"),
    ],
)
def test_partial_runs_name_missing_parts(tmp_path, lines, text):
    folder = write_lines(tmp_path / "run", lines)
    if not lines:
        write_checkpoint(folder, 7, small_model(), {})
    read = Reader(page(read_run(folder)))
    assert text in read.text
    assert "There is no run.yaml" in read.text


@pytest.mark.parametrize(
    ("end", "last", "text"),
    [
        ("", 40, "at step 40 of 100: still running, or killed"),
        ("preempted", 40, "preempted after step 40"),
        ("stopped", 40, "stopped itself after step 40"),
        ("preempted", 100, "finished"),
    ],
)
def test_status_of_a_run(tmp_path, end, last, text):
    write_config(tmp_path)
    events = [{"step": 40, "event": {"kind": end}}] if end else []
    run = write_lines(tmp_path, [{"step": 40, "lr": None}, *events, {"step": last, "lr": None}])
    assert text in Reader(page(read_run(run))).text


def test_a_dense_run(tmp_path):
    config = write_config(tmp_path).to_dict() | {"architecture": "dense"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    dense = {"step": 100, "loss": 2.0, "lr": 0.1, "tokens": 100, "tokens_per_second": 10.0}
    rows = [{"depth": None, "loss": 2.5, "bits_per_byte": 1.25}]
    write_lines(tmp_path, [dense, {"step": 100, "eval/depths": rows}])
    model = DenseTransformer(small_config(), n_layers=2)
    write_checkpoint(tmp_path, 100, model, {"config": config, VALIDATED_DEPTHS: None})
    read = Reader(page(read_run(tmp_path)))
    count = sum(p.numel() for p in model.parameters())
    assert f"A dense model of {count:,} parameters" in read.text
    assert "A dense model has no loops. Its validation loss is 2.5000" in read.text
    assert "Spectrum" not in read.text


def test_a_damaged_checkpoint_is_named(tmp_path):
    folder = write_lines(tmp_path, [line(10)])
    path = write_checkpoint(folder, 10, small_model(), {})
    (path / "model.safetensors").write_bytes(b"\xff" * 64)
    read = Reader(page(read_run(folder)))
    assert "The newest checkpoint (step_00000010) is damaged" in read.text
    assert "whose weights can be read" in read.text


GARBAGE = ["x", -1, [1, None], [[]], {"a": [1]}, 1e300, 10**400, [["x"], [1, 2]]]


@pytest.mark.parametrize("value", GARBAGE, ids=lambda value: repr(value)[:12])
def test_malformed_metrics_do_not_fail(tmp_path, value):
    names = [*line(10), "alarms", "event", "eval/depths", "eval/validated", "mfu", "loop_gap"]
    lines = [line(10), *({"step": 20 + i, name: value} for i, name in enumerate(names))]
    lines += [{"step": 90, **dict.fromkeys(names[1:], value)}]
    Reader(page(read_run(write_lines(tmp_path, lines))))


def test_malformed_lines_are_counted(tmp_path):
    odd = ["null", "[1]", '{"loss": 1}', '{"step": "x"}', "\x00", "{" * 5000, '{"step": 1e999}']
    run = read_run(write_lines(tmp_path, [line(10), *odd, line(20)]))
    assert (run.broken_lines, list(run.steps)) == (len(odd), [10, 20])


def test_a_folder_without_a_run_is_rejected(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="no run to report on"):
            report(str(folder))
    assert list(tmp_path.iterdir()) == []


def test_the_page_is_written_to_out(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    write_lines(tmp_path / "run", [{"step": 1}])
    out = tmp_path / "deep" / "page.html"
    assert report(str(tmp_path / "run"), str(out)) == 0
    assert out.read_text(encoding="utf-8") == page(read_run(tmp_path / "run"))
    assert str(out) in capsys.readouterr().out
    with pytest.raises(EnvironmentError_):
        report(str(tmp_path / "run"), str(tmp_path))


def test_a_real_run(trained_run):
    """The report reads the trainer's files."""
    run = read_run(trained_run)
    assert list(run.steps) == [1, 2, 3, 4]
    for name in ("loss", "lr", "grad_norm", "tokens_per_second", "rho", "mean_depth"):
        assert len(run.values(name)) == 4, name
    for name in ("state_norm", "delta_norm", "router_entropy/layer1"):
        assert len(run.by_loop(name)[1]) == 4, name
    assert [row["depth"] for row in run.evaluations[4]] == [1, 2, 4]
    assert run.checkpoint is not None
    assert len(run.checkpoint.decays) == 32
    read = assert_self_contained(page(run), scripts=0)
    assert "finished, 4 steps" in read.text
    assert "is damaged" not in read.text
    assert "not valid JSON" not in read.text


@pytest.mark.parametrize("value", ["../../x", [1], {"a": 1}, True, float("nan"), 10**400])
def test_settings_of_another_kind_are_left_out(tmp_path, value):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}\n')
    settings = {"train": {"steps": value}, "depth": {"mean": value, "plan": value}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert "at step 2" in page(read_run(tmp_path))
