"""A folder for every tool, its card, and the upload."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers import small_model

from open_mythos import ConfigError, DenseTransformer, from_pretrained, save_pretrained
from open_mythos.cli import main
from open_mythos.errors import EnvironmentError_
from open_mythos.hub import export_folder, push_to_hub
from open_mythos.hub.places import stored_tokenizer
from open_mythos.run_folder import (
    CHECKPOINTS_FOLDER,
    GATE_FILE,
    STATE_FILE,
    TOKENIZER_FOLDER,
    VALIDATED_DEPTHS,
    validated_record,
    write_config,
)
from open_mythos.tokenizer import BPETokenizer, ByteTokenizer
from open_mythos.train.config import DepthConfig, RunConfig

TEXT = "def main(x): return \u00e4\u4e16 \U0001f600\n\t<|eos|>"
RECORD = {
    "low": 2, "high": 6, "best_depth": 4, "tolerance": 0.02,
    "rows": [{"depth": 1, "loss": 3.5}, {"depth": 2, "loss": 3.0}, {"depth": 9, "loss": None}],
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return small_model("gqa", vocab_size=320, max_seq_len=64, n_experts=0)


@pytest.fixture
def checkpoint(model, tmp_path):
    """A model with a tokenizer, validated depths, a gate's record and an origin."""
    folder = tmp_path / "checkpoint"
    save_pretrained(model, folder)
    ByteTokenizer().save(folder / TOKENIZER_FOLDER)
    (folder / STATE_FILE).write_text(json.dumps({VALIDATED_DEPTHS: RECORD}))
    (folder / GATE_FILE).write_text("{}")
    (folder / "provenance.json").write_text(json.dumps({"family": "ouro", "licence": "mit"}))
    return folder


def card_of(checkpoint, out):
    return (export_folder(checkpoint, out) / "README.md").read_text()


def test_byte_tokenizer_of_transformers(tmp_path):
    own = ByteTokenizer()
    rust = own.to_rust()
    assert rust.encode(TEXT) == own.encode(TEXT)
    assert rust.decode(own.encode(TEXT)) == TEXT
    assert (rust.bos_id, rust.eos_id, rust.pad_id) == (own.bos_id, own.eos_id, own.pad_id)
    assert rust.vocab_size == own.vocab_size
    everything = bytes(range(256)).decode("latin-1")
    assert rust.encode(everything) == own.encode(everything)


def test_the_folder_in_both_worlds(model, checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from open_mythos.hf import register

    register()
    out = export_folder(checkpoint, tmp_path / "out", name="owner/name")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(ids, n_loops=3)
        assert torch.equal(from_pretrained(out)(ids, n_loops=3), expected)
        other = AutoModelForCausalLM.from_pretrained(out)(ids, n_loops=3).logits
    assert (other - expected).abs().max() < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(out)
    plain = "def main(x): \u00e4 \U0001f600"
    assert tokenizer(plain).input_ids == ByteTokenizer().encode(plain)
    assert tokenizer.decode(ByteTokenizer().encode(plain)) == plain
    assert tokenizer.eos_token_id == 257
    assert GenerationConfig.from_pretrained(out).eos_token_id == 257
    assert stored_tokenizer(out).encode(TEXT) == ByteTokenizer().encode(TEXT)
    assert (out / GATE_FILE).is_file()
    assert validated_record(out) == RECORD
    assert json.loads((out / "provenance.json").read_text())["family"] == "ouro"


def test_the_card_states_depths(model, checkpoint, tmp_path):
    card = (
        export_folder(checkpoint, tmp_path / "out", name="owner/name") / "README.md"
    ).read_text()
    assert f"**Trained** for {model.cfg.max_loop_iters} loops" in card
    assert "**Validated** for 2 to 6 loops" in card
    assert "| 2 | 3.0000 |" in card
    assert "| 9 |" not in card
    assert "license: mit" in card
    assert "family: ouro" in card
    assert card.count("trust_remote_code=True") == 2, "the tokenizer reads the configuration too"
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card


def test_a_card_without_records(model, tmp_path):
    save_pretrained(model, tmp_path / "plain")
    card = card_of(tmp_path / "plain", tmp_path / "out")
    assert "**Not validated**" in card
    assert "license" not in card
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_card_of_a_run_and_of_a_retrofitted_model(model, tmp_path):
    run = tmp_path / "run"
    save_pretrained(model, run / CHECKPOINTS_FOLDER / "step_00000002")
    (run / "retrofit.json").write_text(json.dumps({"source": "dense", "licence": "mit"}))
    (run / "chat_template.jinja").write_text("{{ messages }}")
    save_pretrained(model, tmp_path / "looped")
    (tmp_path / "looped" / "retrofit.json").write_text("{}")
    assert "untrained beyond one loop" in card_of(tmp_path / "looped", tmp_path / "out")
    write_config(run, RunConfig(depth=DepthConfig(mean=3.0)).to_dict())
    card = card_of(run, tmp_path / "healed")
    assert '**Trained** by the depth plan "poisson", of mean 3' in card
    assert "source: dense" in card
    assert "license: mit" in card
    assert (tmp_path / "healed" / "chat_template.jinja").is_file()


def test_a_trained_tokenizer(model, tmp_path):
    save_pretrained(model, tmp_path / "plain")
    tokenizer = BPETokenizer.train(["a loop and a loop and a loop"] * 3, 280)
    out = export_folder(tmp_path / "plain", tmp_path / "out", tokenizer=tokenizer)
    assert stored_tokenizer(out).fingerprint == tokenizer.fingerprint


def test_upload(checkpoint, monkeypatch):
    seen = {}

    class Api:
        def __init__(self, token):
            seen["token"] = token

        def create_repo(self, name, *, private, exist_ok):
            seen.update(name=name, private=private, exist_ok=exist_ok)

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            seen.update(id=repo_id, files={path.name for path in folder_path.iterdir()})
            return SimpleNamespace(commit_url="address")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert push_to_hub(checkpoint, "owner/name", token="t") == "address"
    assert seen["private"] is True
    assert (seen["name"], seen["id"], seen["token"]) == ("owner/name", "owner/name", "t")
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= seen["files"]


def test_bad_input(model, checkpoint, tmp_path, monkeypatch, capsys):
    with pytest.raises(ConfigError, match="not a name on the hub"):
        push_to_hub(checkpoint, "just-a-name")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="not empty"):
        export_folder(checkpoint, tmp_path / "full")
    save_pretrained(DenseTransformer(model.cfg, 2), tmp_path / "dense")
    with pytest.raises(ConfigError, match="dense model"):
        export_folder(tmp_path / "dense", tmp_path / "out")
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo",
        lambda *_, **__: (_ for _ in ()).throw(OSError("offline")),
    )
    with pytest.raises(EnvironmentError_, match="did not take the model: offline"):
        push_to_hub(checkpoint, "owner/name")
    assert main(["export", str(checkpoint)]) == 2
    assert "--out, --push" in capsys.readouterr().err


def test_a_licence_stays_one_value(checkpoint, tmp_path):
    out = export_folder(checkpoint, tmp_path / "out", licence="other\npipeline_tag: x")
    head = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert head["license"] == "other\npipeline_tag: x"
    assert head["pipeline_tag"] == "text-generation"


def test_the_command(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(checkpoint), "--out", str(out), "--licence", "apache-2.0"]) == 0
    assert str(out) in capsys.readouterr().out
    assert "license: apache-2.0" in (out / "README.md").read_text()
