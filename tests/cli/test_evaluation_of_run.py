"""Commands evaluate a run as the run evaluates itself: text, masks, length, averages, place."""

from __future__ import annotations

import io
import json
import random
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from open_mythos.cli import main
from open_mythos.errors import ConfigError, DataError
from open_mythos.hub.averages import averaged_model
from open_mythos.hub.places import first_id, model_directory, stored_tokenizer, weights_of
from open_mythos.hub.pretrained import from_pretrained
from open_mythos.run_folder import read_config, validated_record
from open_mythos.train import RunConfig, build_run
from open_mythos.train.run import initial_model
from open_mythos.train.setting import described_run, setting_of

SMALL = [
    "--model.dim=32", "--model.n_experts=0", "--model.ffn_dim=32", "--model.n_heads=2",
    "--model.max_loop_iters=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text of short documents and a run on it, started there."""
    folder = tmp_path_factory.mktemp("place")
    r = random.Random(0)
    with (folder / "short.jsonl").open("w") as file:
        for _ in range(600):
            k = r.randrange(26)
            text = (chr(97 + k) * 3 + " " + chr(97 + (k * 7 + 3) % 26) * 3 + " ") * 2
            file.write(json.dumps({"text": text}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert (
            main(["data", "prepare", "short.jsonl", "docs", "--val-fraction=0.1", "--quiet"]) == 0
        )
        assert main([
            "data", "prepare", "short.jsonl", "bpe", "--val-fraction=0.1", "--tokenizer=bpe:300",
            "--quiet",
        ]) == 0  # fmt: skip
        assert main([
            "train", "--variant=nano", *SMALL, "--data.path=docs", "--data.document_masks=true",
            "--train.seq_len=48", "--train.global_batch=4", "--train.steps=12",
            "--train.warmup_steps=2", "--optim.lr=3e-3", "--optim.ema_decay=0.9", "--depth.mean=2",
            "--data.eval_windows=6", "--train.out_dir=runs/m", "--quiet",
        ]) == 0  # fmt: skip
    return folder


def logged(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return next(line["eval/depths"][0]["loss"] for line in lines if "eval/depths" in line)


def evaluated(run, out, *options):
    assert main(["evaluate", str(run), "--depths=[2]", "--quiet", f"--out={out}", *options]) == 0
    return json.loads(out.read_text())


def test_the_number_of_the_run(place, tmp_path, monkeypatch, capsys):
    """From another folder, without options."""
    monkeypatch.chdir(tmp_path)
    found = evaluated(place / "runs" / "m", tmp_path / "new" / "e.json")
    assert found["depths"][0]["loss"] == pytest.approx(logged(place / "runs" / "m"), rel=1e-5)
    assert (found["seq_len"], found["windows"], found["document_masks"]) == (48, 6, True)
    assert (found["weights"], "averages" in capsys.readouterr().err) == ("averaged", True)
    raw = evaluated(place / "runs" / "m", tmp_path / "raw.json", "--weights=raw")
    assert raw["weights"] == "raw"
    assert raw["depths"][0]["loss"] != pytest.approx(found["depths"][0]["loss"], rel=1e-4)


def test_what_is_exported_is_what_was_measured(place, tmp_path, capsys):
    """The averages, unless the others are asked for; nothing that is asked for is ignored."""
    run = str(place / "runs" / "m")
    expected = {
        "averaged": averaged_model(model_directory(run)), "raw": from_pretrained(run)
    }  # fmt: skip
    for options, kind in (([], "averaged"), (["--weights=raw"], "raw")):
        out = tmp_path / kind
        assert main(["export", run, f"--out={out}", *options]) == 0
        assert ("averages" in capsys.readouterr().err) == (kind == "averaged")
        found, wanted = from_pretrained(out).state_dict(), expected[kind].state_dict()
        assert all(torch.equal(found[name], each) for name, each in wanted.items())
    assert main(["export", run, f"--out={tmp_path / 'no'}", "--public"]) == 2


def test_training_from_a_run_with_averages_says_what_it_starts_from(place, caplog):
    config = RunConfig.from_dict(read_config(place / "runs" / "m" / "run.yaml"))
    config.train.init_from = str(place / "runs" / "m")
    initial_model(config)
    assert "raw weights" in caplog.text


def test_other_shards_are_masked_as_the_run_was(place, tmp_path):
    run, other = place / "runs" / "m", place / "docs"
    found = evaluated(run, tmp_path / "e.json", f"--data={other}")
    assert found["depths"][0]["loss"] == pytest.approx(logged(run), rel=1e-5)


def test_a_run_of_a_streamed_text(place, tmp_path, monkeypatch):
    """Which has no shards: its held-out documents are found again, from another folder too."""
    monkeypatch.chdir(place)
    assert main([
        "train", "--variant=nano", *SMALL, "--data.source=short.jsonl", "--data.held_out=0.1",
        "--data.tokenizer=byte", "--data.workers=0", "--train.seq_len=32",
        "--train.global_batch=2", "--train.steps=2", "--train.warmup_steps=1", "--depth.mean=2",
        "--data.eval_windows=2", "--train.out_dir=runs/s", "--quiet",
    ]) == 0  # fmt: skip
    monkeypatch.chdir(tmp_path)
    found = evaluated(place / "runs" / "s", tmp_path / "e.json")
    assert found["depths"][0]["loss"] == pytest.approx(logged(place / "runs" / "s"), rel=1e-5)
    gate = ["train", "gate", str(place / "runs" / "s"), f"--out={tmp_path / 'gate'}"]
    assert main([*gate, "--n-loops=2", "--steps=2", "--positions=32", "--quiet"]) == 0


def test_a_moved_run(place, tmp_path, monkeypatch, capsys):
    run = tmp_path / "moved"
    shutil.copytree(place / "runs" / "m", run)
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(run), "--depths=[2]", "--quiet"]) == 3
    assert "docs" in capsys.readouterr().err  # what was looked for
    shutil.copytree(place / "docs", run / "docs")
    found = evaluated(run, tmp_path / "e.json")
    assert found["depths"][0]["loss"] == pytest.approx(logged(run), rel=1e-5)


@pytest.mark.parametrize("command", [["evaluate"], ["train", "gate"]])
def test_tokens_of_another_tokenizer_are_refused(place, tmp_path, capsys, command):
    run, bpe = str(place / "runs" / "m"), place / "bpe"
    out = [f"--out={tmp_path / 'gate'}"] if command != ["evaluate"] else []
    assert main([*command, run, f"--data={bpe}", "--quiet", *out]) == 3
    assert "another tokenizer" in capsys.readouterr().err
    assert main(["generate", run, "ab", f"--tokenizer={bpe / 'tokenizer'}"]) == 3


def test_a_gate_that_nobody_trained(place, capsys):
    run = str(place / "runs" / "m")
    assert main(["generate", run, "ab", "--exit=gate", "--max-new-tokens=2", "--quiet"]) == 0
    assert "never trained" in capsys.readouterr().err
    assert main(["generate", run, "", "--exit=kl", "--max-new-tokens=2", "--quiet"]) == 0
    assert "never trained" not in capsys.readouterr().err


def test_an_empty_prompt_begins_with_the_token_between_documents(place):
    run = str(place / "runs" / "m")
    tokenizer = stored_tokenizer(run)
    assert first_id(tokenizer, run) == tokenizer.eos_id


def test_a_trace_has_the_weights_of_the_evaluation(place, tmp_path, capsys):
    assert (
        main(["trace", str(place / "runs" / "m"), "", f"--out={tmp_path / 'new' / 't.html'}"]) == 0
    )
    assert "averages" in capsys.readouterr().err


def test_a_console_of_few_characters_keeps_the_result(place, tmp_path, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "cp1252"))
    run, out = str(place / "runs" / "m"), tmp_path / "e.json"
    assert main(["evaluate", run, "--exit=change:0.05", "--windows=1", f"--out={out}"]) == 0
    assert json.loads(out.read_text())["weights"] == "averaged"
    assert b"#" in raw.getvalue()


def test_the_gate_is_trained_on_the_setting_of_the_run(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "gate"
    assert main([
        "train", "gate", str(place / "runs" / "m"), f"--out={out}", "--n-loops=2", "--steps=2",
        "--positions=64", "--quiet",
    ]) == 0  # fmt: skip
    assert json.loads((out / "gate.json").read_text())["weights"] == "averaged"
    trained = validated_record(model_directory(str(place / "runs" / "m")))
    assert trained is not None
    assert validated_record(out) == trained


def test_the_trainer_and_the_commands_share_one_setting(place, monkeypatch):
    monkeypatch.chdir(place)
    run = place / "runs" / "m"
    setting = setting_of(str(run))
    config = RunConfig.from_dict(read_config(run / "run.yaml"))
    own = build_run(config).trainer.evaluate.args[0]
    assert own.described() == setting.described() | {"data": "docs"}
    assert (own.batch, own.tokenizer.fingerprint) == (setting.batch, setting.tokenizer.fingerprint)
    assert described_run(config.to_dict()) == own.described() | {"weights": "averaged"}
    assert described_run({"train": {"seq_len": "much"}}) is described_run({"data": 3}) is None


@pytest.mark.parametrize(
    ("words", "loops"),
    [
        (["generate", "ab", "--max-new-tokens=1", "--n-loops=99"], 99),
        (["generate", "ab", "--max-new-tokens=1", "--exit=fixed:99"], 99),
        (["generate", "ab", "--max-new-tokens=1", "--exit=fixed:99", "--n-loops=2"], None),
        (["trace", "ab", "--n-loops=99"], 99),
        (["trace", "ab"], None),
        (["evaluate", "--depths=[2,99]", "--windows=1"], 99),
        (["evaluate", "--exit=fixed:99", "--windows=1"], 99),
        (["evaluate", "--depths=[2]", "--windows=1"], None),
    ],
)
def test_a_depth_beyond_the_validated_one_is_said(
    place, tmp_path, monkeypatch, capsys, words, loops
):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(place / "runs" / "m", run)
    shutil.copytree(place / "docs", run / "docs")
    (state,) = run.glob("checkpoints/*/state.json")
    found = json.loads(state.read_text()) | {"validated_depths": {"low": 1, "high": 4}}
    state.write_text(json.dumps(found))
    command, *rest = words
    assert main([command, str(run), *rest]) == 0
    said = capsys.readouterr().err
    assert (f"note: {loops} loops: the model is validated at 1 to 4" in said) == bool(loops)
    assert ("note:" in said) == bool(loops)


def test_the_server_uses_the_weights_of_the_evaluation(place, monkeypatch):
    from open_mythos.inference.worker import build_engine

    options = {
        "checkpoint": str(place / "runs" / "m"), "device": "cpu",
        "engine": {"slots": 1, "context": 16},
    }  # fmt: skip
    averaged, facts = build_engine(options)
    raw, others = build_engine({**options, "weights": "raw"})
    assert (facts["weights"], others["weights"]) == ("averaged", "raw")
    assert facts["fingerprint"] != others["fingerprint"]
    assert not averaged.model.head.weight.equal(raw.model.head.weight)
    assert averaged.model.head.weight.equal(
        averaged_model(model_directory(options["checkpoint"])).head.weight
    )


def test_the_server_refuses_another_tokenizer(place, monkeypatch, capsys):
    monkeypatch.setattr("open_mythos.inference.server.life.serve_until_signal", pytest.fail)
    run, other = str(place / "runs" / "m"), str(place / "bpe" / "tokenizer")
    assert main(["serve", run, "--tokenizer", other]) == 3
    assert "another tokenizer" in capsys.readouterr().err


def test_averages_in_shards_are_seen(tmp_path):
    save_file({"average/head.weight": np.zeros(2)}, tmp_path / "shard-00001-model.safetensors")
    assert weights_of(tmp_path) == weights_of(tmp_path, "averaged") == "averaged"
    assert weights_of(tmp_path, "raw") == "raw"
    save_file({"model/head.weight": np.zeros(2)}, tmp_path / "shard-00001-model.safetensors")
    assert weights_of(tmp_path) == "raw"
    with pytest.raises(ConfigError, match="no averaged weights"):
        weights_of(tmp_path, "averaged")
    with pytest.raises(ConfigError, match="kind of weights"):
        weights_of(tmp_path, "mean")
    (tmp_path / "shard-00001-model.safetensors").write_text("x")
    with pytest.raises(DataError, match="shards"):
        weights_of(tmp_path)
