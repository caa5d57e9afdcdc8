"""The one writer of files: whole or not at all, never through a link."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from helpers import small_config

from open_mythos import OpenMythos, save_pretrained
from open_mythos.errors import EnvironmentError_
from open_mythos.files import replacing, write_text
from open_mythos.reports.html import write_html
from open_mythos.run_folder import write_config
from open_mythos.tokenizer import ByteTokenizer
from open_mythos.train.monitoring.metrics import JsonlLogger


def _saved(path):
    save_pretrained(OpenMythos(small_config()), path.parent)


WRITERS = {
    "report.html": lambda path: write_html("page", path),
    "run.yaml": lambda path: write_config(path.parent, {"a": 1}),
    "metrics.jsonl": lambda path: JsonlLogger(path).log(1, {"loss": 1.0}),
    "tokenizer_config.json": lambda path: ByteTokenizer().save(path.parent),
    "config.json": _saved,
    "model.safetensors": _saved,
}


@pytest.mark.parametrize("name", WRITERS)
def test_no_writer_follows_a_link(tmp_path, name):
    precious, folder = tmp_path / "precious", tmp_path / "run"
    precious.write_text("kept")
    folder.mkdir()
    (folder / name).symlink_to(precious)
    with pytest.raises(EnvironmentError_, match="a link to") as found:
        WRITERS[name](folder / name)
    assert precious.read_text() == "kept"
    assert found.value.allowed
    assert found.value.fix


def _write_half(path):
    with replacing(path) as new:
        new.write_text("half of")
        raise OSError(28, "No space left on device")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "new" / "file"
    write_text(path, "old")
    with pytest.raises(EnvironmentError_, match="No such file"), replacing(path) as new:
        new.unlink()
    with pytest.raises(EnvironmentError_, match="No space left"):
        _write_half(path)
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "a_folder", "a_file/below"])
def test_impossible_names_are_typed_errors(tmp_path, name):
    (tmp_path / "a_folder").mkdir()
    (tmp_path / "a_file").touch()
    with pytest.raises(EnvironmentError_, match="cannot be written"):
        write_text(tmp_path / name, "text")


def test_the_umask_decides_who_can_read(tmp_path):
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "text")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_devices_are_written_as_they_are(capfd):
    write_text(Path("/dev/stdout"), "text")
    assert capfd.readouterr().out == "text"
