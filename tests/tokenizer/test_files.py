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


def layout(**changes) -> dict:
    """A small tokenizer of words, with parts of it replaced."""
    vocabulary = {"<unk>": 0, "a": 1, "x": 2}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "decoder"))
    parts |= {"post_processor": None, "added_tokens": [], "version": "1.0", "model": model}
    return parts | changes


def longer(kind: str, part: str, times: int = 12) -> dict:
    step = {"type": "Replace", "pattern": {"String": "x"}, "content": "x" * 10}
    return layout(**{part: {"type": "Sequence", kind: [step] * times}})


WORDS = {"type": "WordLevel", "vocab": {"a": 1, "b": 2**32 - 1}, "unk_token": "a"}
HOSTILE = {
    "ten to the twelve letters": longer("normalizers", "normalizer"),
    "as many when decoding": longer("decoders", "decoder"),
    "4 billion ids": layout(model=WORDS),
    "a broken table": layout(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "no unknown word": layout(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}),
    "an endless search": layout(
        pre_tokenizer={
            "type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated",
            "invert": False,
        }
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_tokenizer_that_was_made_to_fail_is_a_typed_error(tmp_path, name: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(HOSTILE[name]))
    with pytest.raises(DataError) as found:
        load_tokenizer(tmp_path).encode("x" + "a" * 40 + "b")
    assert found.value.fix


def test_a_special_token_has_a_length(tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(longer("normalizers", "normalizer", 1)))
    assert len(load_tokenizer(tmp_path).encode("x")) == 1  # a little longer is fine
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "e" * 10**6}))
    with pytest.raises(DataError, match="vocabulary"):
        load_tokenizer(tmp_path)
