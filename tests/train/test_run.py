"""Text, trainer and folder of a run, built from its configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from open_mythos import mythos_nano
from open_mythos.data import (
    EpochWindows,
    HeldOutWindows,
    Loader,
    StreamLoader,
    TokenShards,
    prepare,
)
from open_mythos.errors import ConfigError, DataError, EnvironmentError_
from open_mythos.hub import from_pretrained
from open_mythos.tokenizer import BPETokenizer, ByteTokenizer
from open_mythos.train import DataConfig, DepthConfig, RunConfig, TrainConfig, build_run, train_run
from open_mythos.train.text import open_tokenizer, training_batches, validation_batches

TEXT = [f"Document {i} says that {i} and {i} is {2 * i}. " * 4 for i in range(120)]
OTHER = [f"Another text, number {i}, about something else. " * 4 for i in range(60)]
SIZES = {"seq_len": 32, "batch": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Prepare shards and plain files of two texts."""
    base = tmp_path_factory.mktemp("texts")
    for name, documents in (("text", TEXT), ("other", OTHER)):
        lines = [json.dumps({"text": text}) for text in documents]
        (base / f"{name}.jsonl").write_text("\n".join(lines))
        prepare(documents, base / name, ByteTokenizer(), val_fraction=0.2)
    prepare(OTHER, base / "whole", ByteTokenizer(), val_fraction=0.0)
    prepare(OTHER, base / "bpe", BPETokenizer.train(OTHER, 300), val_fraction=0.2)
    return base


def run_of(data: DataConfig, out: Path | None = None, **train) -> RunConfig:
    return RunConfig(
        model=mythos_nano(), data=data, depth=DepthConfig(mean=2.0, max_loops=3),
        train=TrainConfig(seq_len=32, global_batch=4, steps=2, warmup_steps=1, device="cpu",
                          log_every=1, out_dir=None if out is None else str(out), **train),
    )  # fmt: skip


def read(source) -> bytes:
    """Return the text of all rows, in order."""
    rows = [row for batch in source.batches for row in batch.input_ids.tolist()]
    return b"".join(ByteTokenizer().decode(row).encode() for row in rows)


def test_a_model_that_does_not_fit_is_refused_before_it_is_built(place, monkeypatch):
    monkeypatch.setattr("open_mythos.train.build.free_memory", lambda device: 1 << 20)
    with pytest.raises(EnvironmentError_, match="does not fit in memory"):
        build_run(run_of(DataConfig(path=str(place / "text"))))


def test_a_warm_up_as_long_as_the_run_is_said(place, caplog):
    config = run_of(DataConfig(path=str(place / "text")))
    config.train.warmup_steps = config.train.steps
    build_run(config)
    assert "never arrives" in caplog.text


class TestValidation:
    def test_shards_have_their_split(self, place):
        data = DataConfig(path=str(place / "text"))
        source = validation_batches(data, ByteTokenizer(), **SIZES)
        assert isinstance(source.batches, EpochWindows)
        assert b"Document" in read(source)
        everything = validation_batches(data, ByteTokenizer(), split="train", **SIZES)
        assert read(everything) != read(source)

    @pytest.mark.parametrize("text", ["path", "source"])
    @pytest.mark.parametrize("val", ["other", "whole", "other.jsonl"])
    def test_a_separate_text_replaces_it(self, place, text, val):
        named = place / ("text" if text == "path" else "text.jsonl")
        data = DataConfig(**{text: str(named)}, val=str(place / val), tokenizer="byte")
        source = validation_batches(data, ByteTokenizer(), **SIZES)
        assert isinstance(source.batches, HeldOutWindows if "." in val else EpochWindows)
        text_read = read(source)
        assert b"Another text" in text_read
        assert b"Document" not in text_read
        assert source.bytes_per_token == pytest.approx(1, abs=0.02)

    def test_a_separate_text_disables_the_held_out_share(self, place):
        data = DataConfig(source=str(place / "text.jsonl"), held_out=0.5, workers=0)
        sizes = {"seq_len": 32, "global_batch": 2, "seed": 0}
        assert training_batches(data, ByteTokenizer(), **sizes).state_dict()["held_out"] == 0.5
        data.val = str(place / "other")
        assert training_batches(data, ByteTokenizer(), **sizes).state_dict()["held_out"] == 0

    def test_it_needs_the_tokenizer_of_the_run(self, place):
        data = DataConfig(path=str(place / "text"), val=str(place / "bpe"))
        with pytest.raises(DataError, match="another tokenizer"):
            validation_batches(data, ByteTokenizer(), **SIZES)

    def test_a_text_too_short_is_an_error(self, place, tmp_path):
        (tmp_path / "short.txt").write_text("short")
        data = DataConfig(path=str(place / "text"), val=str(tmp_path / "short.txt"))
        with pytest.raises(DataError, match="one window"):
            validation_batches(data, ByteTokenizer(), **SIZES)

    def test_a_missing_text_is_named_by_its_field(self, place):
        data = DataConfig(path=str(place / "text"), val="nowhere")
        with pytest.raises(DataError, match="no such source") as caught:
            validation_batches(data, ByteTokenizer(), **SIZES)
        assert (caught.value.where, caught.value.value) == ("data.val", "nowhere")
        with pytest.raises(DataError, match=r"where: +data\.source"):
            training_batches(DataConfig(source="nowhere"), ByteTokenizer(), seq_len=32,
                             global_batch=2, seed=0)  # fmt: skip

    def test_the_run_evaluates_on_it(self, place, tmp_path):
        losses = {}
        for val in ("", str(place / "other"), str(place / "other.jsonl")):
            out = tmp_path / f"run{len(losses)}"
            train_run(run_of(DataConfig(path=str(place / "text"), val=val), out))
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            losses[val] = next(
                row["eval/depths"][0]["loss"] for row in lines if "eval/depths" in row
            )
        assert len(set(losses.values())) == 3


class TestText:
    def test_a_prepared_folder_is_not_streamed(self, place):
        for data in (DataConfig(path=str(place / "text")), DataConfig(source=str(place / "text"))):
            sizes = {"seq_len": 32, "global_batch": 2, "seed": 0}
            assert isinstance(training_batches(data, ByteTokenizer(), **sizes), Loader)
        data = DataConfig(source=str(place / "text.jsonl"), workers=0)
        assert isinstance(training_batches(data, ByteTokenizer(), **sizes), StreamLoader)

    def test_one_text(self, place):
        with pytest.raises(ConfigError, match=r"data\.source"):
            DataConfig(path="a", source="b").validate()

    def test_shards_define_the_tokenizer(self, place):
        config = run_of(DataConfig(path=str(place / "bpe"), tokenizer="byte"))
        expected = TokenShards(place / "bpe").tokenizer().fingerprint
        assert open_tokenizer(config).fingerprint == expected


class TestRun:
    def test_the_folder_describes_the_run(self, place, tmp_path):
        config = run_of(DataConfig(source=str(place / "text.jsonl"), tokenizer="byte", workers=0,
                                   held_out=0.2), tmp_path / "run")  # fmt: skip
        train_run(config)
        stored = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
        assert RunConfig.from_dict(stored) == config
        assert (tmp_path / "run" / "tokenizer").is_dir()
        with pytest.raises(ConfigError, match="holds a run"):
            train_run(config)

    def test_resume_checks_the_text(self, place, tmp_path, caplog):
        config = run_of(DataConfig(source=str(place / "text.jsonl"), tokenizer="byte", workers=0,
                                   held_out=0.2), tmp_path / "run")  # fmt: skip
        train_run(config)
        config.train.steps = 3
        config.data.held_out = 0.3
        with pytest.raises(ConfigError, match=r"data\.held_out: saved 0\.2, now 0\.3"):
            train_run(config, resume="latest")
        config.data.held_out, config.data.source = 0.2, str(place / "other.jsonl")
        with pytest.raises(DataError, match="corpus"):
            train_run(config, resume="latest")
        config.data.source = str(place / "text.jsonl")
        assert train_run(config, resume="latest").step == 3
        assert "nothing is left to train" not in caplog.text
        assert train_run(config, resume="latest").step == 3
        assert "nothing is left to train: the run has 3 steps" in caplog.text

    def test_the_vocabulary_must_hold_the_tokenizers_or_is_fitted(self, place):
        config = run_of(DataConfig(path=str(place / "bpe")))
        config.model.vocab_size = 64
        with pytest.raises(ConfigError, match="vocabulary is smaller"):
            build_run(config)
        run = build_run(config, fit_vocabulary=True)
        assert run.config.model.vocab_size == run.tokenizer.vocab_size
        assert config.model.vocab_size == 64, "the caller's configuration is copied"

    def test_without_a_folder(self, place):
        with pytest.raises(ConfigError, match="out_dir"):
            train_run(run_of(DataConfig(path=str(place / "text"))))

    def test_weights_to_start_from(self, place, tmp_path):
        data = DataConfig(path=str(place / "text"))
        train_run(run_of(data, tmp_path / "first"))
        config = run_of(data, init_from=str(tmp_path / "first"))
        first = build_run(config).trainer.model.state_dict()
        assert all(
            (first[k] == v).all() for k, v in build_run(config).trainer.model.state_dict().items()
        )
        fresh = build_run(run_of(data)).trainer.model.state_dict()
        assert any((first[k] != v).any() for k, v in fresh.items())

    def test_weights_of_a_dense_model_to_start_from(self, place, tmp_path):
        data = DataConfig(path=str(place / "text"))
        first = run_of(data, tmp_path / "first")
        first.architecture = "dense"
        train_run(first)
        stored = from_pretrained(tmp_path / "first")
        again = run_of(data, init_from=str(tmp_path / "first"))
        again.architecture = "dense"
        for model in (first.model, stored.cfg):  # the looped counterpart, or what is stored
            again.model = model
            state = build_run(again).trainer.model.state_dict()
            assert all((state[k] == v).all() for k, v in stored.state_dict().items())
