"""Folders of other projects: whole files, shards, pickles on request, and damage."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from open_mythos import DataError
from open_mythos.errors import EnvironmentError_
from open_mythos.interop.read import read_source

TENSORS = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    return tmp_path


def shards(folder: Path) -> Path:
    save_file({"a": TENSORS["a"]}, folder / "model-1.safetensors")
    save_file({"b": TENSORS["b"]}, folder / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    return path


def check(source) -> None:
    assert source.config == {"model_type": "x"}
    assert set(source.tensors) == set(TENSORS)
    assert len(source.tensors) == len(TENSORS)
    for name, tensor in source.tensors.items():
        assert torch.equal(tensor, TENSORS[name])


def test_one_file(folder):
    save_file(TENSORS, folder / "model.safetensors")
    source = read_source(folder)
    check(source)
    before = source.sha256
    save_file({**TENSORS, "a": TENSORS["a"] + 1}, folder / "model.safetensors")
    assert read_source(folder).sha256 != before


def test_shards(folder):
    shards(folder)
    check(read_source(str(folder)))


def test_pickles_only_on_request(folder):
    torch.save({"model": TENSORS}, folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="--allow-pickle"):
        read_source(folder)
    check(read_source(folder, allow_pickle=True))


def test_safetensors_go_first(folder):
    save_file(TENSORS, folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    check(read_source(folder, allow_pickle=True))


class Hostile:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("content", [{"a": Hostile()}, [1, 2], {"a": 1}])
def test_other_pickles_are_refused(folder, content, capsys):
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="pickle"):
        read_source(folder, allow_pickle=True)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "../model-1.safetensors"}, {"c": "model-1.safetensors"}, {"a": "model-3.safetensors"},
        {"a": 1}, [],
    ],
)  # fmt: skip
def test_a_wrong_index_is_refused(folder, weight_map):
    shards(folder).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(DataError):
        read_source(folder)


def test_damage_and_absence(folder, tmp_path):
    with pytest.raises(DataError, match="no safetensors"):
        read_source(folder)
    os.mkfifo(folder / "model.bin")
    with pytest.raises(DataError, match="not a regular file"):
        read_source(folder, allow_pickle=True)
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(DataError, match="not a regular file"):
        read_source(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(DataError, match="not a complete safetensors file"):
        read_source(folder)
    with pytest.raises(DataError, match="no checkpoint there"):
        read_source(tmp_path / "nowhere")
    (folder / "config.json").write_text("[]")
    with pytest.raises(DataError, match="configuration"):
        read_source(folder)


def test_a_hub_name_without_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(EnvironmentError_, match="owner/nothing"):
        read_source("owner/nothing")
