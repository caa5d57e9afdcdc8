"""Every recipe says what it would do, and does its first steps on a CPU."""

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

from open_mythos import from_pretrained, mythos_nano
from open_mythos.cli.recipe import run_recipe
from open_mythos.cli.recipe.options import fitting_micro_batch, parse_recipe
from open_mythos.cli.recipe.plan import KNOWN_VOCABULARIES, plan
from open_mythos.data import prepare
from open_mythos.errors import ConfigError
from open_mythos.tokenizer import BPETokenizer, ByteTokenizer
from open_mythos.train import OptimConfig, RunConfig, TrainConfig
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
    """The exit code of a recipe run as a script."""
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
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert run_recipe(
        RunConfig(), description="", argv=[*TINY, f"--source={texts}", f"--train.out_dir={out}"]
    ) == 0  # fmt: skip
    return out


@pytest.fixture
def no_network(monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

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
    assert json.loads((out / "source.json").read_text())["source"] in (str(texts), str(shards))


def test_the_promised_recipe() -> None:
    """30 B tokens, 2,000 steps of warm-up, cosine, no step at learning rate zero."""
    recipe = runpy.run_path(str(ROOT / "training" / "3b_fine_web_edu.py"))
    config: RunConfig = recipe["RUN"]
    asked = parse_recipe(
        ["--dry_run"], config, description="", source="", subsets={"a": "stdlib"},
        tokenizer="openai/gpt-oss-20b", tokens=30_000_000_000, held_out=0.0, workers=0,
        from_checkpoint=False,
    )  # fmt: skip
    train, optim = asked.config.train, asked.config.optim
    tokens = train.steps * train.global_batch * train.seq_len
    assert 0 <= tokens - 30_000_000_000 < train.global_batch * train.seq_len
    assert (train.warmup_steps, train.schedule, train.dtype) == (2000, "cosine", "auto")
    rates = [learning_rate(step, train, optim) for step in range(train.steps)]
    assert min(rates) == rates[0] > 0
    assert rates.index(max(rates)) in (1999, 2000)
    assert rates[2000:] == sorted(rates[2000:], reverse=True)
    assert "4,192,228,993 parameters" in plan(asked)


def test_vocabularies_that_a_plan_knows_are_padded_lengths() -> None:
    """gpt-oss has 200,019 ids; GPT-2 50,257, and no beginning and no padding of its own."""
    lengths = {"openai/gpt-oss-20b": 200_019, "openai-community/gpt2": 50_257 + 2}
    assert {name: -(-n // 64) * 64 for name, n in lengths.items()} == KNOWN_VOCABULARIES


def parsed(argv: list[str], **changes):
    options = {
        "description": "", "source": "stdlib", "subsets": {}, "tokenizer": "byte", "tokens": 0,
        "held_out": 0.0, "workers": 0, "from_checkpoint": False,
    }  # fmt: skip
    defaults = changes.pop("defaults", RunConfig(model=mythos_nano()))
    return parse_recipe(argv, defaults, **(options | changes))


def test_tokens_give_the_steps() -> None:
    argv = ["--train.global_batch=4", "--train.seq_len=50"]
    assert parsed(argv, tokens=1001).config.train.steps == 6
    assert parsed([*argv, "--tokens=200"], tokens=1001).config.train.steps == 1
    assert parsed([*argv, "--train.steps", "3"], tokens=1001).config.train.steps == 3
    assert parsed(argv).config.train.steps == TrainConfig().steps


def test_a_file_of_options(tmp_path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("train: {steps: 7, lr: 1}\n")
    assert run_recipe(RunConfig(), description="", argv=[f"--config={path}", "--dry-run"]) == 2
    path.write_text("train: {steps: 7}\nsource: abc\noptim: {lr: 0.5}\n")
    recipe = parsed([f"--config={path}", "--optim.lr=0.25"], tokens=1001)
    assert (recipe.config.train.steps, recipe.source, recipe.config.optim.lr) == (7, "abc", 0.25)


def test_the_printed_configuration_is_the_recipe(tmp_path, monkeypatch, capsys) -> None:
    def printed(*argv: str) -> str:
        assert run("3b_fine_web_edu.py", list(argv), monkeypatch) == 0
        return capsys.readouterr().out

    path = tmp_path / "recipe.yaml"
    path.write_text(printed("--print_config"))
    assert printed(f"--config={path}", "--dry-run") == printed("--dry-run")


def test_what_gives_defaults_is_said_on_the_command_line(tmp_path, trained, capsys) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("variant: tiny\n")
    with pytest.raises(ConfigError, match="--variant on the command line"):
        parsed([f"--config={path}"])
    assert parsed(["--variant", "tiny"]).config.model.dim == 256
    assert run_recipe(RunConfig(), description="", from_checkpoint=True, argv=["--dry-run"]) == 2
    assert "--checkpoint FOLDER" in capsys.readouterr().err
    path.write_text(f"checkpoint: {trained}\n")
    with pytest.raises(ConfigError, match="no model is named"):
        parsed([f"--config={path}"], from_checkpoint=True)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--train.stepz=3"], ["train.steps"]),
        (["--sauce=x"], ["'source'"]),
        (["--variant=3bb"], ["variant", "3b"]),
        (["--subset=sample-1BT"], ["--subset", "sample-10BT"]),
        (["--subset=sample-10BT", "--source=stdlib"], ["--source, --subset"]),
        (["--tokens=10", "--train.steps=3"], ["--tokens, --train.steps"]),
        (["--tokens=-1"], ["--tokens"]),
        (["--held-out=1"], ["--held_out"]),
        (["--train.seq_len=9999"], ["train.seq_len", "max_seq_len"]),
        (["--source=missing/place"], ["no such source"]),
    ],
)
def test_mistakes_are_named(argv: list[str], words: list[str], capsys, no_network) -> None:
    code = run_recipe(
        RunConfig(model=mythos_nano()), description="", argv=[*argv, "--dry-run"],
        subsets={"sample-10BT": "hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT"},
    )  # fmt: skip
    assert code in (2, 3)
    printed = capsys.readouterr().err
    assert all(word in printed for word in words), printed


def test_a_recipe_without_text_asks_for_it(capsys) -> None:
    assert run_recipe(RunConfig(), description="", argv=["--dry-run"]) == 2
    assert "--source" in capsys.readouterr().err


def test_the_hub_out_of_reach_says_what_to_do(tmp_path, monkeypatch, capsys) -> None:
    from huggingface_hub import HfApi

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    code = run("3b_fine_web_edu.py", [*TINY, f"--train.out_dir={tmp_path}"], monkeypatch)
    assert code == 4
    printed = capsys.readouterr().err
    assert "no route to host" in printed
    assert "hf download" in printed


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path, texts, capsys) -> None:
    argv = [*TINY, f"--source={texts}", f"--train.out_dir={tmp_path}", "--model.vocab_size=100"]
    assert run_recipe(RunConfig(), description="", argv=argv) == 2
    assert ">= 320 (byte)" in capsys.readouterr().err


def test_a_resumed_recipe_equals_one_in_a_piece(tmp_path, texts) -> None:
    argv = [*TINY, f"--source={texts}", "--train.schedule=constant"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def go(out: Path, *more: str) -> int:
        return run_recipe(
            RunConfig(), description="", argv=[*argv, f"--train.out_dir={out}", *more]
        )

    assert go(whole, "--train.steps=5") == 0
    assert go(parts, "--train.steps=2", "--resume=auto") == 0  # nothing there yet
    assert go(parts, "--train.steps=5") == 2  # a run is there already
    assert go(parts, "--train.steps=4", "--resume=auto", "--workers=2") == 0
    assert go(parts, "--train.steps=5", "--resume=latest") == 0
    assert losses(parts) == losses(whole)
    assert go(parts, "--train.steps=6", "--resume=latest", "--held-out=0.1") == 3  # other data


def test_continued_training_starts_from_the_weights(tmp_path, texts, trained) -> None:
    def first_loss(name: str, *more: str) -> float:
        out = tmp_path / name
        argv = [word for word in TINY if not word.startswith(("--variant", "--tokenizer"))]
        argv += [f"--source={texts}", f"--train.out_dir={out}", f"--checkpoint={trained}", *more]
        defaults = RunConfig(optim=OptimConfig(lr=1e-3), train=TrainConfig(seed=5))
        assert run_recipe(defaults, description="", from_checkpoint=True, argv=argv) == 0
        return losses(out)[1]

    before = losses(trained)
    assert before[2] < before[1]
    # a model that was trained for two steps is better than an untrained one on other windows too
    assert first_loss("next") < before[1]
    out = tmp_path / "refused"
    argv = [f"--source={texts}", f"--train.out_dir={out}", f"--checkpoint={trained}"]
    assert run_recipe(
        RunConfig(), description="", from_checkpoint=True, argv=[*argv, "--model.dim=64"]
    ) == 2  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "batch", "fitting"),
    [(4, 8, 4), (4, 2, 2), (None, 8, None), (5, 12, 4), (5, 3, 3), (4, 7, 1), (1, 1, 1)],
)
def test_the_micro_batch_fits(wanted: int | None, batch: int, fitting: int | None) -> None:
    assert fitting_micro_batch(wanted, batch) == fitting


def test_only_a_micro_batch_that_was_asked_for_is_refused() -> None:
    assert parsed(["--train.global_batch=6", "--train.micro_batch=3"]).config.train.micro_batch == 3
    with pytest.raises(ConfigError, match="micro_batch"):
        parsed(["--train.global_batch=6", "--train.micro_batch=4"])
    run = RunConfig(model=mythos_nano(), train=TrainConfig(micro_batch=4))
    changed = parsed(["--train.global_batch=6"], defaults=run)
    assert changed.config.train.micro_batch == 3


def test_two_processes_compute_what_one_does(tmp_path, texts) -> None:
    """The same command under torchrun: batches, losses and positions are the same; it resumes."""
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

    recipe = runpy.run_path(str(ROOT / "training" / "debug_cpu.py"))
    options = {"description": "", "argv": [*argv, f"--train.out_dir={lone}", "--train.steps=4"]}
    assert run_recipe(recipe["RUN"], **options) == 0
    torchrun(pair, 2)
    more = [*argv, f"--train.out_dir={pair}", "--train.steps=4", "--resume=latest"]
    assert run_recipe(recipe["RUN"], description="", argv=more) == 0  # goes on alone
    assert losses(pair) == pytest.approx(losses(lone), abs=5e-6)
    lone_data, pair_data = (
        json.loads((out / "checkpoints" / "step_00000004" / "state.json").read_text())["data"]
        for out in (lone, pair)
    )
    assert lone_data == pair_data
    assert len(lone_data["lanes"]) == 4


def test_tokenizers_of_recipes_are_kept_with_the_run(trained) -> None:
    config = json.loads((trained / "tokenizer" / "tokenizer_config.json").read_text())
    assert config["name_or_path"] == ByteTokenizer.name
