"""Every command of the command line, with usage errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from open_mythos.accounting import account
from open_mythos.cli import main
from open_mythos.hub.transformers_format import describe_flat
from open_mythos.model.dense import DenseTransformer, parameter_count
from open_mythos.variants import mythos_nano, variant

TEXT = "def add(a, b):\n    return a + b\n\n" * 200


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error."""
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    for i in range(8):
        (folder / "text").mkdir(exist_ok=True)
        (folder / "text" / f"{i}.py").write_text(f"# file {i}\n" + TEXT)
    prepare = ["data", "prepare", str(folder / "text"), str(folder / "shards"), "--quiet"]
    assert main([*prepare, "--val-fraction", "0.4"]) == 0
    return folder / "shards"


def train_arguments(shards: Path, out: Path, steps: int) -> list[str]:
    return [
        "train", "--variant", "nano", "--data.path", str(shards), "--train.out_dir", str(out),
        f"--train.steps={steps}", "--train.warmup-steps", "2", "--train.seq_len", "32",
        "--train.global_batch", "4", "--depth.mean", "2", "--train.eval_depths", "[1,2,4]",
        "--data.eval_windows", "4", "--train.log_every", "1", "--train.schedule", "constant",
        "--quiet",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    assert main(train_arguments(shards, out, 4)) == 0
    return out


def test_help_loads_no_torch() -> None:
    code = (
        "import sys; from open_mythos.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--model.kv_lora_rank" in done.stdout


@pytest.mark.parametrize(
    ("argv", "message", "code"),
    [
        (["train", "--train.stps", "3"], "did you mean 'train.steps'?", 2),
        (["info", "1c"], "allowed: nano, tiny", 2),
        (["info", "1b", "--lops", "[1]"], "did you mean 'loops'?", 2),
        (["train", "--variant", "hughe"], "unknown variant", 2),
        (["train", "--model.dim", "many"], "model.dim", 2),
        (["train", "--train.steps", "0"], "train.steps", 2),
        (["generate", "nowhere", "x"], "no model there", 3),
        (["evaluate", "nowhere"], "no model there", 3),
        (["data", "prepare", "nowhere", "out"], "nowhere", 3),
        (["data", "prepare", "stdlib", "out", "--tokenizer", "bpe:many"], "bpe:N", 2),
        (["train", "--nope", "1"], "see open-mythos train --help", 2),
        (["train", "--resume", "latest", "--train.out_dir", "none"], "no checkpoint", 3),
        (["plan", "nano", "--n_loops", "0"], "n_loops", 2),
        (["plan", "nano", "--context", "0"], "context", 2),
        (["train", "--dry-run", "--data.val", "nowhere"], "data.val", 3),
        (["plan", "nano", "--mfu", "1:30.5"], "is no decimal number", 2),
        (["plan", "nano", "--gpus=1:30"], "is no decimal number", 2),
        (["evaluate", "nowhere", "--depths=[1:30]"], "is no decimal number", 2),
        (["train", "--depth", "{mean: 1:30}"], "is no decimal number", 2),
        (["train", "--model.rope_scaling", "{factor: 1:30}"], "is no decimal number", 2),
        (["plan", "nano", "--config", "{gpus: 2}"], "{gpus: 2}", 3),
        (["train", "--model", "nano.yaml"], "not a set of fields", 2),
        (["train", "--data=/dev/zero"], "not a set of fields", 2),
        (["serve", "nowhere", "--engine", "engine.yaml"], "not a set of fields", 2),
        (["--version", "please"], "--version please", 2),
        (["nonsense"], "nonsense", 2),
    ],
)
def test_usage_errors(
    argv: list[str], message: str, code: int, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    got, _, err = run(capsys, *argv)
    assert (got, message in err) == (code, True), err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir()), "the command must not leave files behind"


def test_a_variable_of_the_parser_with_another_value(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "1")
    code, _, err = run(capsys, "info", "nano")
    assert (code, "JSONARGPARSE_DEBUG" in err) == (2, True), err


def test_info_matches_accounting(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info", "3b", "--loops", "[1,16]", "--json")
    rows = json.loads(out)["depths"]
    assert code == 0
    assert [row["n_loops"] for row in rows] == [1, 16]
    assert rows[1]["parameters"] == account(variant("3b")).parameters
    assert rows[1]["cache_bytes_per_token"] == account(variant("3b"), 16).cache_bytes()
    code, out, _ = run(capsys, "info", "3b")
    assert f"{account(variant('3b')).parameters:,}" in out


def test_info_of_files_and_folders(
    trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    content = {"model": variant("nano").to_dict()}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "model.json").write_text(json.dumps(content))  # 1e-06 is a string in YAML 1.1
    for place in (tmp_path / "model.yaml", tmp_path / "model.json", trained):
        code, out, _ = run(capsys, "info", str(place), "--json")
        assert code == 0
        assert json.loads(out)["depths"][0]["parameters"] == account(variant("nano")).parameters


def test_info_of_dense_runs_and_exported_models(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A dense run's ``run.yaml`` holds the looped model that the dense one equals."""
    cfg, path = variant("nano"), tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"architecture": "dense", "model": cfg.to_dict()}))
    (tmp_path / "config.json").write_text(json.dumps(describe_flat(cfg, "float32")))
    with torch.device("meta"):
        dense = DenseTransformer.like(cfg)
    expected = {path: parameter_count(dense), tmp_path / "config.json": account(cfg).parameters}
    assert len(set(expected.values())) == 2
    for place, parameters in expected.items():
        code, out, _ = run(capsys, "info", str(place), "--json")
        assert (code, json.loads(out)["depths"][0]["parameters"]) == (0, parameters)
    code, _, err = run(capsys, "info", str(path), "--loops=[2]")
    assert (code, "a dense model has no loops" in err) == (2, True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("model.json", "{", "not a readable JSON file"),
        ("model.yaml", "model: [", "not a readable YAML file"),
        ("model.json", "5", "not a configuration"),
        ("model.yaml", "- 1", "not a configuration"),
        ("config.json", "{}", "of another format"),
    ],
)
def test_info_of_damaged_files(
    name: str, text: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    code, _, err = run(capsys, "info", str(tmp_path / name))
    assert (code, message in err) == (3, True), err


def test_printed_config_is_a_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--variant", "nano", "--optim.lr", "0.5", "--print-config"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["model"]["dim"] == variant("nano").dim
    path = tmp_path / "run.yaml"
    path.write_text(text.replace("dim: 128", "dimm: 128", 1))
    code, _, err = run(capsys, "train", "--config", str(path))
    assert (code, "dimm" in err) == (2, True), err
    path.write_text(text)
    with pytest.raises(SystemExit):
        main(["train", "--config", str(path), "--optim.lr", "0.25", "--print-config"])
    again = yaml.safe_load(capsys.readouterr().out)
    assert again["optim"]["lr"] == 0.25
    assert again["model"] == yaml.safe_load(text)["model"]


def test_training_writes_a_run_folder(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    measured = next(line["eval/depths"] for line in lines if "eval/depths" in line)
    assert [row["depth"] for row in measured] == [1, 2, 4]
    assert all(0 < row["bits_per_byte"] < 9 for row in measured)
    assert yaml.safe_load((trained / "run.yaml").read_text())["train"]["steps"] == 4


def test_a_run_is_resumed_and_never_overwritten(
    trained: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *train_arguments(shards, trained, 6))
    assert (code, "--resume latest" in err) == (2, True)
    half, whole = tmp_path / "half", tmp_path / "whole"
    assert main(train_arguments(shards, half, 3)) == 0
    assert main([*train_arguments(shards, half, 6), "--resume", "latest"]) == 0
    assert main(train_arguments(shards, whole, 6)) == 0
    weights = [(run / "checkpoints").glob("*6/model.safetensors") for run in (half, whole)]
    first, second = (next(found).read_bytes() for found in weights)
    assert first == second


def test_generate(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(trained), "def ", "--max-new-tokens", "12", "--n-loops", "3"]
    code, streamed, _ = run(capsys, *command)
    assert code == 0
    assert streamed.startswith("def ")
    _, quiet, _ = run(capsys, *command, "--quiet")
    assert streamed == "def " + quiet
    _, other, _ = run(capsys, *command, "--quiet", "--seed", "1")
    assert other != quiet
    code, _, err = run(capsys, "generate", str(trained), "def ", "--n-loops", "0")
    assert (code, "n_loops" in err) == (2, True)


def test_as_many_tokens_as_the_model_allows(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    (file,) = (tmp_path / "run").glob("checkpoints/*/config.json")
    values = json.loads(file.read_text())
    values["config"]["max_output_tokens"] = 3
    file.write_text(json.dumps(values))
    assert run(capsys, "generate", str(tmp_path / "run"), "def ", "--quiet")[0] == 0


def test_evaluate(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    code, shown, _ = run(
        capsys, "evaluate", str(trained), "--depths", "[1,2,4]", "--windows", "4",
        "--seq_len", "32", "--batch", "4", "--out", str(out), "--quiet",
    )  # fmt: skip
    assert code == 0
    rows = json.loads(out.read_text())["depths"]
    assert [row["depth"] for row in rows] == [1, 2, 4]
    lines = (trained / "metrics.jsonl").read_text().splitlines()
    logged = next(json.loads(x)["eval/depths"] for x in lines if "eval/depths" in x)
    assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in logged], rel=1e-5)
    assert f"{rows[0]['bits_per_byte']:.4f}" in shown


def test_a_dry_run_counts_the_dense_model(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "train", "--variant", "nano", "--architecture=dense", "--dry-run")
    dense = DenseTransformer.like(mythos_nano())
    shown = f"{parameter_count(dense):,} parameters"
    assert (code, shown in out, "2 blocks" in out) == (0, True, True), out
    words = ("train", "--variant", "nano", "--architecture=dense", "--dry-run", "--depth.mean=8")
    code, _, err = run(capsys, *words)
    assert (code, "a dense model has no loops" in err) == (2, True), err


def test_text_of_another_tokenizer_is_rejected(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some words, and some more words. " * 40)
    shards = str(tmp_path / "bpe")
    prepare = ["data", "prepare", str(text), shards, "--tokenizer", "bpe:280", "--quiet"]
    assert main([*prepare, "--val_fraction", "0"]) == 0
    evaluate = ["evaluate", str(trained), "--data", shards, "--split", "train"]
    train = ["train", "--checkpoint", str(trained), "--data.path", shards, "--quiet"]
    for words in (evaluate, [*train, "--train.out_dir", str(tmp_path / "run")]):
        code, _, err = run(capsys, *words)
        assert (code, "another tokenizer" in err) == (3, True), err


def test_evaluate_makes_the_folder_of_its_rows_or_says_why_it_cannot(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--depths", "[1]", "--windows", "1", "--seq_len", "32", "--quiet"]
    rows = tmp_path / "new" / "rows.json"
    for out, expected in ((rows, 0), (rows / "below.json", 4)):
        code, _, err = run(capsys, "evaluate", str(trained), *few, "--out", str(out))
        assert (code, "--out" in err) == (expected, expected == 4), err
    assert json.loads(rows.read_text())


def test_outputs_replace_nothing_but_their_own_kind(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--out`` may have been completed to a file of the run."""
    few = ["--depths", "[1]", "--windows", "1", "--seq_len", "32", "--quiet"]
    precious, out = tmp_path / "run.yaml", tmp_path / "out"
    precious.write_text("seed: 1")
    for words in (
        ["evaluate", str(trained), *few], ["trace", str(trained), "a"], ["report", str(trained)]
    ):  # fmt: skip
        out.write_text("")
        assert [run(capsys, *words, "--out", str(out))[0] for _ in "12"] == [0, 0]
        code, _, err = run(capsys, *words, "--out", str(precious))
        assert (code, "of another kind" in err) == (4, True), err
    assert precious.read_text() == "seed: 1"
