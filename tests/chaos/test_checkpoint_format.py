"""``docs/checkpoint_format.md`` describes what is written; older formats are still read."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from chaos import small_run
from open_mythos.errors import DataError
from open_mythos.train import verify_checkpoint
from open_mythos.train.checkpoint import manifest

PAGE = Path(__file__).parents[2] / "docs" / "checkpoint_format.md"
BLOCK = manifest.HASH_BLOCK_BYTES


@pytest.fixture
def newest(straight, tmp_path):
    """The last checkpoint of a run, to be damaged."""
    name = f"step_{small_run.STEPS:08d}"
    return shutil.copytree(straight.out / "checkpoints" / name, tmp_path / name)


def test_the_page_lists_the_files(newest):
    text = PAGE.read_text()
    listed = re.findall(r"^    ([\w.]+) {2,}\S", text, re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in newest.iterdir())


def test_the_page_lists_the_state(newest):
    table = PAGE.read_text().partition("**`state.json`**")[2].partition("\n\nThere is no")[0]
    listed = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert listed == list(json.loads((newest / "state.json").read_text()))


def test_names_of_tensors(newest):
    with safe_open(newest / "optimizer.safetensors", "pt") as file:
        assert "recurrent.injection.log_A/exp_avg" in set(file.keys())
    with safe_open(newest / "average.safetensors", "pt") as file:
        assert {"updates", "recurrent.injection.log_A"} <= set(file.keys())


def test_files_can_be_read_by_whom_the_folder_can(newest):
    for path in newest.iterdir():
        assert path.stat().st_mode & 0o777 == newest.stat().st_mode & 0o666, path.name


@pytest.mark.parametrize(
    ("manifest_json", "said"),
    [
        ({"format": 3, "files": {}}, "format 2"),
        ({"format": 2}, "format 2"),
        ({"format": 2, "files": {"model.safetensors": 7}}, "model.safetensors"),
        ({"format": 2, "files": {"../run.yaml": {"bytes": 1, "sha256": []}}}, "run.yaml"),
        ([], "a JSON object"),
    ],
)
def test_a_strange_manifest_is_damage(tmp_path, manifest_json, said):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest_json, indent=2) + "\n")
    with pytest.raises(DataError, match="the checkpoint is damaged") as caught:
        verify_checkpoint(tmp_path)
    assert said in str(caught.value)


@pytest.mark.parametrize("place", [0, BLOCK - 1, BLOCK, 2 * BLOCK + 5])
def test_damage_is_located(tmp_path, place):
    """By blocks of 16 MiB."""
    content = bytearray(2 * BLOCK + 6)
    blocks = range(0, len(content), BLOCK)
    hashes = [hashlib.sha256(content[i : i + BLOCK]).hexdigest() for i in blocks]
    entry = {"bytes": len(content), "sha256": hashes}
    (tmp_path / "manifest.json").write_text(manifest.manifest_text({"large": entry}))
    (tmp_path / "large").write_bytes(content)
    verify_checkpoint(tmp_path)
    content[place] ^= 1
    (tmp_path / "large").write_bytes(content)
    with pytest.raises(DataError) as caught:
        verify_checkpoint(tmp_path)
    first = place // BLOCK * BLOCK
    assert caught.value.value == f"other content within 16 MiB of byte {first}"
