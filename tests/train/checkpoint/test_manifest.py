"""What is read back from the disk is compared byte by byte."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from open_mythos.errors import EnvironmentError_
from open_mythos.train.checkpoint.manifest import entry_of_file, entry_of_tensors, entry_of_text

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


@pytest.mark.parametrize(
    "change", [None, "a byte", "a zero's sign", "a name", "a shape", "a dtype"]
)
def test_tensors_are_compared_with_the_file(tmp_path, change):
    path, written = tmp_path / "file", {name: each.clone() for name, each in TENSORS.items()}
    if change == "a byte":
        written["b"][3] = 1.0078125
    elif change == "a zero's sign":
        written["a"][0, 0] = -0.0
    elif change == "a name":
        written["c"] = written.pop("b")
    elif change == "a shape":
        written["a"] = written["a"].reshape(3, 2)
    elif change == "a dtype":
        written["b"] = written["b"].half()
    save_file(written, path)
    with ThreadPoolExecutor() as pool:
        if change is None:
            assert entry_of_tensors(path, TENSORS, pool) == entry_of_file(path)
            return
        with pytest.raises(EnvironmentError_, match="read back"):
            entry_of_tensors(path, TENSORS, pool)


def test_texts_are_compared_with_the_file(tmp_path):
    (tmp_path / "file").write_text("texu")
    with ThreadPoolExecutor() as pool, pytest.raises(EnvironmentError_, match="read back"):
        entry_of_text(tmp_path / "file", "text", pool)
