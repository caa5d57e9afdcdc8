"""Early exit on the command line: train a gate, evaluate a rule, generate with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers import small_config, small_model

from open_mythos import DenseTransformer
from open_mythos.cli import main
from open_mythos.data import TokenShards
from open_mythos.evaluation import evaluate_exits
from open_mythos.hub.pretrained import from_pretrained, save_pretrained
from open_mythos.model.exit_rules import exit_rule
from open_mythos.model.trace import LoopTrace
from open_mythos.tokenizer import ByteTokenizer
from open_mythos.train.setting import setting_of

GATE = "recurrent.halting.gate."
FEW = ["--positions", "200", "--steps", "20", "--n-loops", "4", "--batch", "4", "--seq_len", "33"]
RULE = "change:0.3"


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error."""
    code = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level model in a run folder with configuration and tokenizer."""
    base = tmp_path_factory.mktemp("text")
    (base / "text").mkdir()
    for i in range(8):
        (base / "text" / f"{i}.txt").write_text(f"file {i}: " + "to be or not to be\n" * 40)
    prepare = ["data", "prepare", str(base / "text"), str(base / "shards"), "--quiet"]
    assert main([*prepare, "--val-fraction", "0.4"]) == 0
    run_folder, tok = base / "run", ByteTokenizer()
    save_pretrained(
        small_model("gqa", vocab_size=tok.vocab_size), run_folder / "checkpoints" / "step_4"
    )
    tok.save(run_folder / "tokenizer")
    (run_folder / "run.yaml").write_text(yaml.safe_dump({"data": {"path": str(base / "shards")}}))
    return run_folder


@pytest.fixture(scope="module")
def gated(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The byte-level model with a trained gate."""
    out = tmp_path_factory.mktemp("gate") / "model"
    assert main(["train", "gate", str(text), "--out", str(out), *FEW, "--quiet"]) == 0
    return out


class TestTrainGate:
    def test_only_the_gate_changes(self, text, gated):
        before, after = (from_pretrained(folder).state_dict() for folder in (text, gated))
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {GATE + "weight", GATE + "bias"}

    def test_other_commands_read_the_folder(self, gated, capsys):
        found = json.loads((gated / "gate.json").read_text())
        assert found["config"]["n_loops"] == 4
        assert len(found["report"]["curve"]) == 20
        code, shown, _ = run(capsys, "evaluate", gated, "--exit", "gate:0.7", "--windows", "4",
                             "--seq_len", "32", "--quiet")  # fmt: skip
        assert code == 0
        assert "gate:0.7" in shown
        assert run(capsys, "generate", gated, "to ", "--max_new_tokens", "3", "--quiet")[0] == 0

    def test_train_gate_with_a_dash(self, text, tmp_path, capsys):
        weights = []
        for command in (("train", "gate"), ("train-gate",)):
            out = tmp_path / command[0]
            assert run(capsys, *command, text, "--out", out, *FEW, "--quiet")[0] == 0
            weights.append((out / "model.safetensors").read_bytes())
        assert weights[0] == weights[1]

    @pytest.mark.parametrize("words", [("train",), ("train", "gate"), ("data", "prepare")])
    def test_help(self, words, capsys):
        with pytest.raises(SystemExit) as stop:
            main([*words, "--help"])
        printed = capsys.readouterr().out
        assert stop.value.code == 0
        assert ("--target" in printed, "--model.dim" in printed) == (
            words[-1] == "gate",
            len(words) == 1,
        )

    def test_a_folder_that_is_not_empty_is_rejected(self, text, tmp_path, capsys):
        (tmp_path / "mine").write_text("dear")
        code, _, err = run(capsys, "train", "gate", text, "--out", tmp_path, *FEW)
        assert (code, "not empty" in err) == (2, True)
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]


class TestEvaluate:
    def test_the_report_matches_the_library(self, text, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "100")
        out = tmp_path / "exits.json"
        code, shown, _ = run(
            capsys, "evaluate", text, "--exit", RULE, "--n_loops", "6", "--windows", "4",
            "--seq_len", "32", "--batch", "4", "--repeats", "1", "--out", out, "--quiet",
        )  # fmt: skip
        assert code == 0
        model = from_pretrained(text)
        path = yaml.safe_load((text / "run.yaml").read_text())["data"]["path"]
        source = setting_of(str(text), seq_len=32, windows=4, batch=4).source("val")
        assert source.bytes_per_token == TokenShards(path, "val").bytes_per_token
        expected = evaluate_exits(
            model, source.batches, exit_rule(RULE, model), 6, bytes_per_token=source.bytes_per_token
        )
        found = json.loads(out.read_text())
        assert (found["exit"], found["split"]) == (RULE, "val")
        assert found["report"]["histogram"] == expected.histogram
        for row in expected.rows:
            assert f"{row.loss:.4f}" in shown
            assert f"{row.mean_loops:.2f}" in shown
            assert f"{row.accuracy:.2%}" in shown
        assert found["report"]["adaptive"]["seconds"] > 0
        assert "random exits" in shown
        most = max(expected.histogram)
        (fullest,) = [line for line in shown.splitlines() if f" {most:,} " in line and "█" in line]
        assert fullest.count("█") == 30

    def test_dense_models_are_rejected(self, text, tmp_path, capsys):
        dense = DenseTransformer.like(small_config("gqa", vocab_size=ByteTokenizer().vocab_size))
        save_pretrained(dense, tmp_path)
        path = yaml.safe_load((text / "run.yaml").read_text())["data"]["path"]
        for argv in (
            ("evaluate", tmp_path, "--data", path, "--exit", "stable", "--seq_len", "32"),
            ("evaluate", tmp_path, "--data", path, "--depths", "[1,2]", "--seq_len", "32"),
            ("generate", tmp_path, "x", "--exit", "stable", "--tokenizer", "byte"),
            ("train", "gate", tmp_path, "--data", path, "--out", tmp_path / "out"),
        ):
            code, _, err = run(capsys, *argv)
            assert code == 2, err
            assert "Traceback" not in err
            assert "dense" in err or "no loops" in err


class TestGenerate:
    def test_text_and_loops_match_the_library(self, text, capsys):
        command = ["generate", text, "to be", "--max_new_tokens", "5", "--n_loops", "7",
                   "--temperature", "0"]  # fmt: skip
        code, streamed, err = run(capsys, *command, "--exit", RULE)
        assert code == 0
        model, tok = from_pretrained(text), ByteTokenizer()
        ids = torch.tensor([tok.encode("to be")])
        out = model.generate(
            ids, 5, 7, temperature=0.0, eos_token_id=tok.eos_id, exit_rule=exit_rule(RULE, model)
        )
        assert streamed == "to be" + tok.decode(out[0, ids.shape[1] :].tolist()) + "\n"
        trace = LoopTrace()
        model(out[:, :-1], 7, exit_rule=exit_rule(RULE, model), trace=trace)  # cached = whole
        assert trace.exits is not None
        loops = trace.exits.float().mean()
        assert 1 < loops < 7
        note, count = err.splitlines()
        assert "7 loops: the model was trained with 4" in note
        assert count == f"{loops:.2f} of 7 loops per token, {trace.exits.numel()} tokens"
        assert "per token" not in run(capsys, *command, "--exit", RULE, "--quiet")[2]
        assert "per token" not in run(capsys, *command)[2]
        _, _, err = run(capsys, *command, "--exit", RULE, "--min_loops", "7")
        assert "7.00 of 7 loops per token" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("evaluate", "MODEL", "--exit", "never"), "gate:THRESHOLD"),
        (("generate", "MODEL", "x", "--min_loops", "2", "--tokenizer", "byte"), "--min-loops"),
        (
            ("generate", "MODEL", "x", "--exit", "kl", "--min_loops", "99", "--tokenizer", "byte"),
            "at most",
        ),
        (("evaluate", "MODEL", "--exit", "kl:0"), "correct kl in exit rule (--exit)"),
        (("evaluate", "MODEL", "--exit", "kl", "--depths", "[1,2]"), "--depths"),
        (("evaluate", "MODEL", "--n_loops", "3"), "only an exit rule reads this"),
        (("evaluate", "MODEL", "--repeats", "3"), "only an exit rule reads this"),
        (("evaluate", "MODEL", "--exit", "kl", "--n_loops", "0"), "n_loops"),
        (("evaluate", "MODEL", "--batch", "0"), "--batch"),
        (("evaluate", "MODEL", "--windows", "0"), "--windows"),
        (("train", "gate", "MODEL", "--seq_len", "0", "--out", "OUT"), "--seq_len"),
        (("generate", "MODEL", "x", "--exit", "never", "--tokenizer", "byte"), "gate:THRESHOLD"),
        (("train", "gate", "MODEL", "--target", "both", "--out", "OUT"), "remaining, marginal"),
        (("train", "gate", "MODEL", "--n_loops", "1", "--out", "OUT"), "n_loops"),
        (("train", "gate", "MODEL", "--stps", "1"), "did you mean 'steps'?"),
        (("train", "gate"), "checkpoint"),
        (("train", "gat", "MODEL"), "gat"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_usage_errors(argv, message, text, tmp_path, capsys):
    places = {"MODEL": text, "OUT": tmp_path / "out"}
    code, _, err = run(capsys, *(places.get(word, word) for word in argv))
    assert (code, message in err) == (2, True), err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir()), "the command must not leave files behind"


def test_a_model_without_a_run_needs_data(tmp_path, capsys):
    save_pretrained(small_model("gqa", vocab_size=24), tmp_path)
    code, _, err = run(capsys, "evaluate", tmp_path)
    assert (code, "--data" in err, "run.yaml" in err) == (3, True, True)
