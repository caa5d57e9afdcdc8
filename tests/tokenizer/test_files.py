"""Tokenizers on disk: damaged files, remote code beside them, places that cannot be written."""

import json

import pytest

from open_mythos.errors import DataError, EnvironmentError_
from open_mythos.tokenizer import load_tokenizer
from tokenizer.samples import BPE


def test_saving_where_nothing_can_be_written(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentError_, match="saved"):
        BPE.save(tmp_path / "file" / "folder")


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\x80\x04pickle", b"{" * 100_000, b'{"a":' * 100_000]
)
def test_a_damaged_tokenizer_file_is_named(tmp_path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", '{"a":' * 100_000])
def test_a_damaged_tokenizer_config_is_named(tmp_path, content: str) -> None:
    BPE.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_remote_code_beside_a_local_tokenizer_is_never_run(tmp_path) -> None:
    BPE.save(tmp_path)
    (tmp_path / "evil.py").write_text("open('ran', 'w')")
    config = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "eos_token": "<|eos|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).encode("the cat") == BPE.encode("the cat")
    assert not (tmp_path / "ran").exists()
