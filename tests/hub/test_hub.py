"""Saving and loading: exact round trips, and DataErrors alone from damaged or hostile files."""

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from helpers import small_config
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from open_mythos.config import MythosConfig
from open_mythos.errors import DataError, EnvironmentError_
from open_mythos.hub.pretrained import describe, from_pretrained, save_pretrained
from open_mythos.model.dense import DenseTransformer
from open_mythos.model.mythos import OpenMythos


def experts_and_all() -> MythosConfig:
    """Every kind of part, and head and embedding apart."""
    return small_config(vocab_size=320)


def looped(**changes) -> OpenMythos:
    cfg = experts_and_all()
    for name, value in changes.items():
        setattr(cfg, name, value)
    return OpenMythos(cfg)


def scrambled(model):
    """The model with random weights everywhere, zero-initialized ones and buffers included."""
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return model.eval()


@pytest.fixture
def saved(tmp_path) -> Path:
    save_pretrained(looped(), tmp_path)
    return tmp_path


def rewrite(path: Path, change) -> None:
    """Apply ``change`` to the JSON file at ``path``."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


MODELS = {
    "mla": lambda: looped(),
    "gqa": lambda: looped(attn_type="gqa"),
    "tied": lambda: looped(tie_embeddings=True),
    "bare": lambda: looped(
        lora_rank=0, n_experts=0, readout=False, prelude_norm=False, injection_matrix="diagonal"
    ),
    "dense": lambda: DenseTransformer(experts_and_all(), 5, ffn_dim=77),
    "dense tied": lambda: DenseTransformer(looped(tie_embeddings=True).cfg, 2),
}


@pytest.mark.parametrize("kind", MODELS)
def test_round_trip_is_exact(kind, tmp_path):
    model = scrambled(MODELS[kind]())
    save_pretrained(model, tmp_path / "deep" / "folder")
    loaded = from_pretrained(tmp_path / "deep" / "folder")
    assert type(loaded) is type(model)
    assert loaded.cfg == model.cfg
    for (name, before), (_, after) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert torch.equal(before, after), name
    ids = torch.randint(0, model.cfg.vocab_size, (2, 9))
    assert torch.equal(model(ids), loaded(ids))
    assert not loaded.training
    for (name, ours), (_, theirs) in zip(
        loaded.named_parameters(), model.named_parameters(), strict=True
    ):
        assert ours.requires_grad == theirs.requires_grad != ("halting" in name), name


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    save_pretrained(looped(tie_embeddings=True), tmp_path)
    assert "head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = from_pretrained(tmp_path)
    assert loaded.head.weight is loaded.embedding.weight


def test_dtype_converts_parameters_and_leaves_buffers(saved):
    loaded = from_pretrained(saved, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in loaded.buffers()} == {torch.float32}


def test_dtype_defaults_to_what_was_stored(tmp_path):
    save_pretrained(looped().bfloat16(), tmp_path)
    assert from_pretrained(tmp_path).head.weight.dtype == torch.bfloat16


def test_config_file_says_what_it_is(saved):
    values = json.loads((saved / "config.json").read_text())
    assert values == describe(looped())
    assert (values["format"], values["library"]) == (1, "open-mythos")
    assert values["architecture"] == "looped"


def test_saving_replaces_and_leaves_nothing_else(saved):
    save_pretrained(DenseTransformer(experts_and_all()), saved)
    assert sorted(os.listdir(saved)) == ["config.json", "model.safetensors"]
    assert isinstance(from_pretrained(saved), DenseTransformer)


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_a_failed_save_leaves_the_old_file(saved, monkeypatch, kind):
    before = (saved / "model.safetensors").read_bytes()

    def full_disk(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise kind("no space left on device")

    monkeypatch.setattr("open_mythos.hub.pretrained.save_file", full_disk)
    with pytest.raises(EnvironmentError_, match="no space"):
        save_pretrained(looped(dim=64), saved)
    assert (saved / "model.safetensors").read_bytes() == before
    assert sorted(os.listdir(saved)) == ["config.json", "model.safetensors"]


def test_loaded_weights_do_not_hang_on_the_file(saved):
    loaded = from_pretrained(saved)
    before = loaded.head.weight.clone()
    (saved / "model.safetensors").write_bytes(b"")
    assert torch.equal(loaded.head.weight, before)


@pytest.mark.parametrize("where", ["", "checkpoints"])
def test_a_run_loads_its_newest_checkpoint(where, tmp_path):
    for step in (2, 10):
        model = looped()
        torch.nn.init.constant_(model.head.weight, step)
        save_pretrained(model, tmp_path / where / f"step_{step}")
    (tmp_path / where / "step_00000011").mkdir()  # without a model: not yet written
    assert from_pretrained(tmp_path).head.weight.unique().tolist() == [10]


# --- rejected files ------------------------------------------------------------------------------


def drop(tensors):
    del tensors["recurrent.injection.log_A"]


def add(tensors):
    tensors["evil"] = torch.zeros(1)


def reshape(tensors):
    tensors["head.weight"] = tensors["head.weight"][:-1].clone()


def retype(tensors):
    tensors["head.weight"] = tensors["head.weight"].long()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drop, "missing recurrent.injection.log_A"),
        (add, "unexpected evil"),
        (reshape, r"head.weight is \[319, 32\], not \[320, 32\]"),
        (retype, "head.weight is I64"),
    ],
)
def test_tensors_must_be_exactly_the_models(saved, change, named):
    tensors = load_file(saved / "model.safetensors")
    change(tensors)
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(DataError, match=named):
        from_pretrained(saved)


def in_config(**changes):
    return lambda values: values["config"].update(changes)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (in_config(n_expert=8), "n_experts"),
        (in_config(dim=-1), "dim"),
        (in_config(dim="128"), "dim"),
        (in_config(attn_type=["mla"]), "attn_type"),
        (in_config(vocab_size=10**30), "vocab_size"),
        (in_config(max_loop_iters=10**18), "max_loop_iters"),
        (in_config(prelude_layers=10**12), "prelude_layers"),
        (in_config(prelude_layers=4000), "more layers"),
        (lambda values: values.update(config=[]), "holds no fields"),
        (lambda values: values.update(format=2), "another format"),
        (lambda values: values.update(library="other"), "another library"),
        (lambda values: values.update(architecture="__import__"), "architecture"),
        (lambda values: values.update(architecture=["looped"]), "architecture"),
        (lambda values: values.update(auto_map={"AutoModel": "evil.py"}), "auto_map"),
        (lambda values: values.update(architecture="dense"), "n_layers"),
        (lambda values: values.update(architecture="dense", n_layers=10**12), "more layers"),
        (lambda values: values.update(architecture="dense", n_layers=True), "number of layers"),
    ],
)
def test_bad_configurations_are_rejected(saved, change, named):
    rewrite(saved / "config.json", change)
    with pytest.raises(DataError, match=named):
        from_pretrained(saved)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b" " * (2 << 20)]
)
def test_a_corrupted_config_is_rejected(saved, content):
    (saved / "config.json").write_bytes(content)
    with pytest.raises(DataError):
        from_pretrained(saved)


class Evil:
    """A pickle of this leaves a file behind when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def safetensors_with(header: dict, data: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HOSTILE = {
    "empty": b"",
    "oversized header": struct.pack("<Q", 1 << 62) + b"{}",
    "header past the end": struct.pack("<Q", 1000) + b"{}",
    "no JSON": struct.pack("<Q", 4) + b"evil",
    "offsets past the end": safetensors_with(
        {"x": {**TENSOR, "data_offsets": [0, 1 << 40]}}, b"1234"
    ),
    "negative offsets": safetensors_with({"x": {**TENSOR, "data_offsets": [-4, 0]}}, b"1234"),
    "overlapping": safetensors_with({"x": TENSOR, "y": TENSOR}, b"1234"),
    "shape overflows": safetensors_with({"x": {**TENSOR, "shape": [1 << 62, 1 << 62]}}, b"1234"),
    "path as name": safetensors_with({"../../evil": TENSOR}, b"1234"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_malicious_weights_are_rejected(saved, kind):
    (saved / "model.safetensors").write_bytes(HOSTILE[kind])
    before = sorted(saved.parent.rglob("*"))
    with pytest.raises(DataError):
        from_pretrained(saved)
    assert sorted(saved.parent.rglob("*")) == before


def test_every_truncation_is_rejected(saved):
    whole = (saved / "model.safetensors").read_bytes()
    for length in (7, 8, 100, len(whole) // 2, len(whole) - 1):
        (saved / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(DataError):
            from_pretrained(saved)


@pytest.mark.parametrize("kind", ["shard of an index", "shard of a run"])
def test_pipes_are_not_waited_for(saved, kind):
    (saved / "model.safetensors").unlink()
    name = "a.safetensors" if "index" in kind else "shard-00001-model-00001-of-00001.safetensors"
    os.mkfifo(saved / name)
    if "index" in kind:
        index = {"weight_map": {"embedding.weight": name}}
        (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="not a regular file"):
        from_pretrained(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pickle_under_another_name_is_not_executed(saved, tmp_path, name):
    trap = tmp_path / "executed"
    (saved / name).write_bytes(pickle.dumps(Evil(trap)))
    with pytest.raises(DataError):
        from_pretrained(saved)
    assert not trap.exists()


def test_pickled_weights_are_not_looked_at(saved, tmp_path):
    trap = tmp_path / "executed"
    (saved / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt"):
        (saved / name).write_bytes(pickle.dumps(Evil(trap)))
    with pytest.raises(DataError, match="never read"):
        from_pretrained(saved)
    assert not trap.exists()


def test_no_such_folder(tmp_path):
    with pytest.raises(DataError, match="no model there"):
        from_pretrained(tmp_path / "absent")
    with pytest.raises(DataError, match="no model"):
        from_pretrained(tmp_path)


# --- the hub -------------------------------------------------------------------------------------


def test_a_hub_name_loads_the_downloaded_folder(saved, monkeypatch):
    asked = []

    def snapshot(model_id, revision, allow_patterns):
        asked.append((model_id, revision, allow_patterns))
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert isinstance(from_pretrained("someone/some-model"), OpenMythos)
    ((name, revision, files),) = asked
    assert (name, revision) == ("someone/some-model", None)
    assert {"config.json", "model*.safetensors", "tokenizer*.json", "gate.json"} <= set(files)
    assert not [file for file in files if file.endswith((".bin", ".pt", ".py"))]


def test_no_network_is_an_environment_error(monkeypatch):
    def offline(model_id, revision, allow_patterns):
        raise ConnectionError("name resolution failed")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(EnvironmentError_, match=r"name resolution failed[\s\S]*hf download"):
        from_pretrained("someone/some-model")


def test_a_hub_model_is_loaded_at_a_revision(saved, monkeypatch):
    asked = []

    def snapshot(model_id, revision, allow_patterns):
        asked.append((model_id, revision))
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    commit = "0123456789abcdef0123456789abcdef01234567"
    from_pretrained(f"someone/some-model@{commit}")
    from_pretrained("someone/some-model@refs/pr/1")
    assert asked == [("someone/some-model", commit), ("someone/some-model", "refs/pr/1")]


def test_a_foreign_hub_model_is_a_data_error(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(DataError, match="not saved by this library"):
        from_pretrained("someone/some-model")


@pytest.mark.parametrize(
    "name", ["../evil", "a/b/c", "/absent/model", "owner/../x", "plain", "a/b@", "a/b@../x"]
)
def test_paths_are_never_taken_for_hub_names(name, monkeypatch):
    def never(*_, **__):
        raise AssertionError("asked the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", never)
    with pytest.raises(DataError):
        from_pretrained(name)


def test_a_mistyped_folder_beside_others_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no model there"):
        from_pretrained("runs/typo")
