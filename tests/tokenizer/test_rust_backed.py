"""Tokenizers of other makers: special tokens, sizes, stored settings."""

import json

import pytest
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from open_mythos.errors import DataError
from open_mythos.tokenizer import BPETokenizer, ByteTokenizer, MythosTokenizer, get_vocab_size
from open_mythos.tokenizer.rust_backed import RustBacked
from tokenizer.samples import foreign


def test_missing_special_tokens_are_added_after_the_others(tmp_path) -> None:
    rust = foreign()
    rust.save(str(tmp_path / "tokenizer.json"))
    tokenizer = MythosTokenizer(tmp_path / "tokenizer.json")
    before = rust.get_vocab_size()
    assert sorted([tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id]) == [
        before,
        before + 1,
        before + 2,
    ]
    assert len(tokenizer) == before + 3


@pytest.mark.parametrize("as_object", [False, True])
def test_declared_special_tokens_are_used_and_a_shared_one_goes_to_eos(tmp_path, as_object) -> None:
    end = "<|endoftext|>"
    rust = foreign(end)
    rust.save(str(tmp_path / "tokenizer.json"))
    token = {"content": end} if as_object else end
    config = {"bos_token": token, "eos_token": token, "pad_token": None, "name_or_path": "x/gpt"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = MythosTokenizer(str(tmp_path))
    assert tokenizer.eos_id == rust.token_to_id(end)
    assert {tokenizer.bos_id, tokenizer.pad_id} == {len(tokenizer) - 1, len(tokenizer) - 2}
    assert tokenizer.name == "x/gpt"
    assert tokenizer.eos_id not in tokenizer.encode(end)


def test_special_tokens_are_declared_in_either_file(tmp_path) -> None:
    rust = foreign("<|end|>")
    rust.add_special_tokens(["<|start|>", "<|mask|>"])
    rust.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "", "eos_token": null}')
    parts = {"bos_token": {"content": "<|start|>"}, "eos_token": "<|end|>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(parts))
    tokenizer = MythosTokenizer(str(tmp_path))
    ids = (tokenizer.eos_id, tokenizer.bos_id)
    assert ids == (rust.token_to_id("<|end|>"), rust.token_to_id("<|start|>"))


def test_sizes_count_added_tokens_and_gaps_of_the_ids(tmp_path) -> None:
    rust = foreign()
    rust.add_tokens([f"<extra{i}>" for i in range(100)])
    base = rust.get_vocab_size(with_added_tokens=False)
    rust.save(str(tmp_path / "tokenizer.json"))
    assert len(MythosTokenizer(tmp_path)) == base + 103
    gap = RustTokenizer(models.WordLevel({"a": 0, "b": 500}, unk_token="a"))
    gap.save(str(tmp_path / "tokenizer.json"))
    assert get_vocab_size(tmp_path) >= 512


def test_stored_truncation_and_padding_do_not_apply(tmp_path) -> None:
    rust = foreign()
    rust.enable_truncation(2)
    rust.enable_padding(length=50)
    rust.save(str(tmp_path / "tokenizer.json"))
    tokenizer = MythosTokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("0123456789")) == "0123456789"
    assert tokenizer.encode("") == []


def test_bos_eos_and_pad_that_cannot_differ_are_rejected(tmp_path) -> None:
    foreign("<|bos|>").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|bos|>"}')
    with pytest.raises(DataError, match="differ"):
        MythosTokenizer(tmp_path)


def test_the_most_bytes_of_a_token() -> None:
    """Bounds the tokens of a text from below; None where nothing does."""
    bpe = BPETokenizer.train(["hello hello hello é é é 東京 東京 東京"] * 9, 300)
    most = bpe.most_token_bytes
    assert most is not None
    for text in ("hello" * 50, "東京" * 50, " \n\t" * 50, "\0" * 50, "👩‍🔬" * 20):
        assert len(bpe.encode(text)) * most >= len(text.encode())
    assert ByteTokenizer().most_token_bytes == 1
    for change in (
        lambda rust: setattr(rust, "normalizer", normalizers.NFC()),
        lambda rust: setattr(rust, "pre_tokenizer", pre_tokenizers.Whitespace()),
        lambda rust: rust.add_tokens([AddedToken("x", lstrip=True)]),
    ):
        rust = RustTokenizer.from_str(bpe._rust.to_str())
        change(rust)
        assert RustBacked(rust, "changed", {}).most_token_bytes is None
