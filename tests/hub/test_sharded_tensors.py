"""Stored tensors are read into tensors of their names and shapes, or not at all."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from open_mythos.errors import DataError
from open_mythos.hub.sharded_tensors import read_tensors, stored_shapes, write_shards


@pytest.fixture
def folder(tmp_path):
    save_file({"a": torch.arange(3.0), "b": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    return tmp_path


def test_it_is_read(folder):
    into = {"model/a": torch.zeros(3), "model/b": torch.zeros(2, 3)}
    assert stored_shapes(folder) == {name: each.shape for name, each in into.items()}
    read_tensors(folder, into)
    assert into["model/a"].tolist() == [0, 1, 2]
    assert into["model/b"].eq(1).all()


@pytest.mark.parametrize("shape", [(2, 3), (1, 3), (3, 1)])
def test_another_shape_is_refused_before_anything_changes(folder, shape):
    """The first two would take the values of three numbers by broadcasting."""
    into = {"model/b": torch.zeros(2, 3), "model/a": torch.zeros(shape)}
    with pytest.raises(DataError, match=r"model/a does not match"):
        read_tensors(folder, into)
    assert not into["model/b"].any()


def test_a_missing_tensor_is_named(folder):
    with pytest.raises(DataError, match=r"model/c does not match(.|\n)*missing"):
        read_tensors(folder, {"model/c": torch.zeros(3)})


@pytest.mark.parametrize("kept", [0, 4, 100])
def test_a_damaged_shard_is_named(tmp_path, kept):
    (shard,) = write_shards(tmp_path, {"model/a": torch.arange(30.0)})
    assert stored_shapes(tmp_path) == {"model/a": (30,)}
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(DataError, match="shards cannot be read"):
        stored_shapes(tmp_path)
