"""Dry runs and the first training steps of every recipe, on a CPU."""

from __future__ import annotations

import json
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from open_mythos import from_pretrained
from open_mythos.cli import main
from open_mythos.cli.dry_run import KNOWN_VOCABULARIES, described
from open_mythos.cli.parser import parse
from open_mythos.data import prepare
from open_mythos.errors import ConfigError
from open_mythos.tokenizer import BPETokenizer, ByteTokenizer
from open_mythos.train import RunConfig, TrainConfig
from open_mythos.train.config import fitting_micro_batch
from open_mythos.train.optimizers.schedule import learning_rate

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "training").glob("*.py"))
TEXT = [f"{{Document}} {i} says that {i} and {i} is {2 * i}. " * 4 for i in range(200)]
TINY = [
    "--variant=nano", "--tokenizer=byte", "--held-out=0.2", "--data.eval_windows=2", "--workers=0",
    "--train.seq_len=32", "--train.global_batch=4", "--train.steps=2", "--train.device=cpu",
    "--train.log_every=1", "--train.save_every=0", "--train.warmup_steps=1", "--quiet",
]  # fmt: skip


def run(name: str, argv: list[str], monkeypatch) -> int:
    """Run a recipe as a script and return its exit code."""
    monkeypatch.setattr(sys, "argv", [name, *argv])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "training" / name), run_name="__main__")
    return ended.value.code


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in metrics(folder) if "loss" in row}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for file in range(2):
        lines = [json.dumps({"text": text}) for text in TEXT[file::2]]
        (folder / f"{file}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "shards"
    prepare(TEXT, folder, BPETokenizer.train(TEXT, 300), val_fraction=0.2)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, texts) -> Path:
    """Return the folder of a finished run."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", *TINY, f"--source={texts}", f"--train.out_dir={out}"]) == 0
    return out


@pytest.fixture
def no_network(monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_dry_run_prints_the_plan_and_touches_nothing(
    path: Path, monkeypatch, capsys, no_network, shards, trained
) -> None:
    argv = ["--dry-run"]
    if path.stem in ("prepared_shards", "continue_run"):
        argv.append(f"--source={shards}")
    if path.stem == "continue_run":
        argv += [f"--checkpoint={trained}", "--train.seq_len=64"]
    monkeypatch.chdir(shards.parent)
    before = sorted(shards.parent.rglob("*"))
    assert run(path.name, argv, monkeypatch) == 0
    printed = capsys.readouterr().out
    for row in ("model", "depth", "text", "tokenizer", "length", "batch", "schedule", "processes"):
        assert re.search(rf"^{row} +\S", printed, re.MULTILINE), row
    assert sorted(shards.parent.rglob("*")) == before


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_first_steps(path: Path, monkeypatch, tmp_path, texts, shards, trained) -> None:
    out = tmp_path / "run"
    argv = [*TINY, f"--source={shards if path.stem == 'prepared_shards' else texts}",
            f"--train.out_dir={out}"]  # fmt: skip
    if path.stem == "continue_run":
        argv = [word for word in argv if "variant" not in word and "tokenizer" not in word]
        argv += [f"--checkpoint={trained}", "--train.decay_steps=1"]
    assert run(path.name, argv, monkeypatch) == 0
    found = losses(out)
    assert sorted(found) == [1, 2]
    assert all(0 < loss < 12 for loss in found.values())
    assert any("eval/depths" in row for row in metrics(out))
    assert (out / "checkpoints" / "step_00000002").is_dir()
    config = RunConfig.from_dict(yaml.safe_load((out / "run.yaml").read_text()))
    assert from_pretrained(out).cfg == config.model
    assert config.data.source in (str(texts), str(shards))


def test_the_promised_recipe() -> None:
    """Check 30 B tokens, 2,000 warm-up steps, cosine decay, and learning rates above zero."""
    config = parsed(["--recipe=3b_fine_web_edu"])
    train, optim = config.train, config.optim
    tokens = train.steps * train.global_batch * train.seq_len
    assert 0 <= tokens - 30_000_000_000 < train.global_batch * train.seq_len
    assert (train.warmup_steps, train.schedule, train.dtype) == (2000, "cosine", "auto")
    rates = [learning_rate(step, train, optim) for step in range(train.steps)]
    assert min(rates) == rates[0] > 0
    assert rates.index(max(rates)) in (1999, 2000)
    assert rates[2000:] == sorted(rates[2000:], reverse=True)
    assert "4,192,228,993 parameters" in described(config)


def test_known_vocabularies_are_padded_lengths() -> None:
    """gpt-oss has 200,019 ids; GPT-2 has 50,257, without BOS and padding tokens."""
    lengths = {"openai/gpt-oss-20b": 200_019, "openai-community/gpt2": 50_257 + 2}
    assert {name: -(-n // 64) * 64 for name, n in lengths.items()} == KNOWN_VOCABULARIES


def parsed(argv: list[str]) -> RunConfig:
    """Return the configuration that a command line parses to."""
    return parse(["train", *argv])[1]["config"]


def test_tokens_give_the_steps() -> None:
    argv = ["--recipe=140m_fine_web_edu", "--train.global_batch=4", "--train.seq_len=50"]
    assert parsed(argv).train.steps == 14_000_000
    assert parsed([*argv, "--tokens=200"]).train.steps == 1
    assert parsed([*argv, "--tokens=1001"]).train.steps == 6
    for text in ("1K", "1e3", "0.001M"):
        assert parsed([*argv, f"--tokens={text}"]).train.steps == 5
    assert parsed([*argv, "--train.steps", "3"]).train.steps == 3
    assert parsed(["--variant=nano"]).train.steps == TrainConfig().steps
    # a decay that fits the resulting steps, but not those of the recipe's own batch
    decay = ["--train.schedule=wsd", "--train.warmup_steps=1", "--train.decay_steps=2"]
    assert parsed([*argv, "--tokens=2000", *decay]).train.steps == 10


def test_a_file_of_options(tmp_path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("train: {steps: 7, lr: 1}\n")
    assert main(["train", f"--config={path}", "--dry-run"]) == 2
    path.write_text("train: {steps: 7}\ndata: {source: abc}\noptim: {lr: 0.5}\n")
    config = parsed(["--recipe=140m_fine_web_edu", f"--config={path}", "--optim.lr=0.25"])
    assert (config.train.steps, config.data.source, config.optim.lr) == (7, "abc", 0.25)


def test_the_printed_configuration_is_the_recipe(tmp_path, monkeypatch, capsys) -> None:
    def printed(*argv: str) -> str:
        assert run("3b_fine_web_edu.py", list(argv), monkeypatch) == 0
        return capsys.readouterr().out

    path = tmp_path / "recipe.yaml"
    path.write_text(printed("--print_config"))
    assert printed(f"--config={path}", "--dry-run") == printed("--dry-run")


def test_options_that_set_defaults_belong_on_the_command_line(tmp_path, trained, capsys) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("variant: tiny\n")
    with pytest.raises(ConfigError, match="variant"):
        parsed([f"--config={path}"])
    assert parsed(["--variant", "tiny"]).model.dim == 256
    assert main(["train", "--recipe=continue_run", "--dry-run"]) == 2
    assert "--checkpoint FOLDER" in capsys.readouterr().err
    config = parsed(["--recipe=continue_run", "--source=x", f"--checkpoint={trained}",
                     "--train.seq_len=64"])  # fmt: skip
    assert (config.train.init_from, config.model.dim) == (str(trained), 128)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--train.stepz=3"], ["train.steps"]),
        (["--data.sauce=x"], ["'data.source'"]),
        (["--recipe=3b_fine_web"], ["unknown recipe", "'3b_fine_web_edu'"]),
        (["--variant=3bb"], ["variant", "3b"]),
        (["--subset=sample-1BT"], ["--subset", "sample-10BT"]),
        (["--subset=sample-10BT", "--source=stdlib"], ["--source, --subset"]),
        (["--tokens=10", "--train.steps=3"], ["--tokens, --train.steps"]),
        (["--tokens=-1"], ["--tokens"]),
        (["--tokens=1X"], ["--tokens", "30B"]),
        (["--held-out=1"], ["data.held_out"]),
        (["--train.seq_len=9999"], ["train.seq_len", "max_seq_len"]),
        (["--source=missing/place"], ["no such source"]),
    ],
)
def test_usage_errors(argv: list[str], words: list[str], capsys, no_network) -> None:
    recipe = [] if any("recipe" in word for word in argv) else ["--recipe=140m_fine_web_edu"]
    code = main(["train", *recipe, *argv, "--dry-run"])
    assert code in (2, 3)
    printed = capsys.readouterr().err
    assert all(word in printed for word in words), printed


def test_a_recipe_may_require_a_text(capsys) -> None:
    assert main(["train", "--recipe=prepared_shards", "--dry-run"]) == 2
    assert "--source" in capsys.readouterr().err


def test_an_unreachable_hub(tmp_path, monkeypatch, capsys) -> None:
    from huggingface_hub import HfApi

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    code = run("3b_fine_web_edu.py", [*TINY, f"--train.out_dir={tmp_path}"], monkeypatch)
    assert code == 4
    printed = capsys.readouterr().err
    assert "no route to host" in printed
    assert "hf download" in printed


def test_a_vocabulary_that_is_too_small_is_rejected(tmp_path, texts, capsys) -> None:
    argv = [*TINY, f"--source={texts}", f"--train.out_dir={tmp_path}", "--model.vocab_size=100"]
    assert main(["train", *argv]) == 2
    assert ">= 259 (byte)" in capsys.readouterr().err


def test_a_resumed_recipe_equals_an_uninterrupted_one(tmp_path, texts) -> None:
    argv = [*TINY, f"--source={texts}", "--train.schedule=constant"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def go(out: Path, *more: str) -> int:
        return main(["train", *argv, f"--train.out_dir={out}", *more])

    assert go(whole, "--train.steps=5") == 0
    assert go(parts, "--train.steps=2", "--resume=auto") == 0  # nothing there yet
    assert go(parts, "--train.steps=5") == 2  # a run is there already
    assert go(parts, "--train.steps=4", "--resume=auto", "--workers=2") == 0
    assert go(parts, "--train.steps=5", "--resume=latest") == 0
    assert losses(parts) == losses(whole)
    assert go(parts, "--train.steps=6", "--resume=latest", "--held-out=0.1") == 2  # other data
    (parts.parent / "more").mkdir()
    (parts.parent / "more" / "0.jsonl").write_text(json.dumps({"text": "another text " * 500}))
    argv[-2] = f"--source={parts.parent / 'more'}"
    assert go(parts, "--train.steps=6", "--resume=latest") == 3


def test_continued_training_starts_from_the_weights(tmp_path, texts, trained) -> None:
    def first_loss(name: str, *more: str) -> float:
        out = tmp_path / name
        argv = [word for word in TINY if not word.startswith(("--variant", "--tokenizer"))]
        argv += [f"--source={texts}", f"--train.out_dir={out}", f"--checkpoint={trained}", *more]
        assert main(["train", *argv, "--optim.lr=1e-3", "--train.seed=5"]) == 0
        return losses(out)[1]

    before = losses(trained)
    assert before[2] < before[1]
    # a model that was trained for two steps is better than an untrained one on other windows too
    assert first_loss("next") < before[1]
    out = tmp_path / "refused"
    argv = [f"--source={texts}", f"--train.out_dir={out}", f"--checkpoint={trained}"]
    assert main(["train", *argv, "--model.dim=64", "--train.seq_len=32"]) == 2


@pytest.mark.parametrize(
    ("wanted", "batch", "fitting"),
    [(4, 8, 4), (4, 2, 2), (None, 8, None), (5, 12, 4), (5, 3, 3), (4, 7, 1), (1, 1, 1)],
)
def test_the_micro_batch_fits(wanted: int | None, batch: int, fitting: int | None) -> None:
    assert fitting_micro_batch(wanted, batch) == fitting


def test_only_an_explicit_micro_batch_is_rejected() -> None:
    assert parsed(["--train.global_batch=6", "--train.micro_batch=3"]).train.micro_batch == 3
    with pytest.raises(ConfigError, match="micro_batch"):
        parsed(["--train.global_batch=6", "--train.micro_batch=4"])
    changed = parsed(["--recipe=3b_fine_web_edu", "--train.global_batch=6"])
    assert changed.train.micro_batch == 3


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path, texts) -> None:
    """Under torchrun, the same command has equal batches, losses and positions, and resumes."""
    lone, pair = tmp_path / "lone", tmp_path / "pair"
    argv = [
        *(word for word in TINY if not word.startswith("--train.steps")), f"--source={texts}",
        "--train.micro_batch=4", "--train.schedule=constant",
    ]  # fmt: skip

    def torchrun(out: Path, steps: int, *more: str) -> None:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            str(ROOT / "training" / "debug_cpu.py"), *argv, f"--train.out_dir={out}",
            f"--train.steps={steps}", "--workers=1", *more,
        ]  # fmt: skip
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]

    recipe = ["train", "--recipe=debug_cpu", *argv, "--train.steps=4"]
    assert main([*recipe, f"--train.out_dir={lone}"]) == 0
    torchrun(pair, 2)
    assert main([*recipe, f"--train.out_dir={pair}", "--resume=latest"]) == 0  # continues alone
    # four steps take the loss from 7.5 to 1.9, and rounding grows with them
    assert losses(pair) == pytest.approx(losses(lone), rel=2e-5)
    lone_data, pair_data = (
        json.loads((out / "checkpoints" / "step_00000004" / "state.json").read_text())["data"]
        for out in (lone, pair)
    )
    assert lone_data == pair_data
    assert len(lone_data["lanes"]) == 4


def test_the_tokenizer_is_saved_with_the_run(trained) -> None:
    config = json.loads((trained / "tokenizer" / "tokenizer_config.json").read_text())
    assert config["name_or_path"] == ByteTokenizer.name
