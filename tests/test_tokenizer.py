"""Tokenizers: round trips, special ids, local files, and what happens offline."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from open_mythos import tokenizer as module
from open_mythos.errors import ConfigError, DataError, EnvironmentError_
from open_mythos.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    MythosTokenizer,
    StreamDecoder,
    Tokenizer,
    get_vocab_size,
    load_tokenizer,
)

CORPUS = [
    "the cat sat on the mat, the cat sat still\n" * 20,
    "def f(x):\n    return x + 12345\n" * 9,
]
BYTE = ByteTokenizer()
BPE = BPETokenizer.train(CORPUS, 320)
TOKENIZERS = [BYTE, BPE]
texts = st.text(st.characters(exclude_categories=["Cs"]))
both = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["byte", "bpe"])


def foreign(eos: str | None = None) -> RustTokenizer:
    """A tokenizer.json as others make them: without our special tokens."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=[eos] if eos else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        vocab_size=300,
        show_progress=False,
    )
    rust.train_from_iterator(CORPUS, trainer)
    return rust


@both
@settings(deadline=None)
@given(text=texts)
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < len(tokenizer) for i in ids)
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)


@both
@pytest.mark.parametrize(
    "text", ["<|bos|><|eos|>", "a<|pad|>b", "\r\n\t ", "\x00", "\ufffd", "👩‍🔬"]
)
def test_special_names_and_odd_characters_are_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_id not in tokenizer.encode(text)


@both
def test_batches_equal_single_texts(tokenizer: Tokenizer) -> None:
    batch = [*CORPUS, "", "é<|eos|>"]
    assert tokenizer.encode_batch(batch) == [tokenizer.encode(text) for text in batch]


@both
def test_the_interface(tokenizer: Tokenizer) -> None:
    assert isinstance(tokenizer, Tokenizer)
    specials = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    assert len(set(specials)) == 3
    assert max(specials) < len(tokenizer) <= tokenizer.vocab_size
    assert tokenizer.vocab_size % 64 == 0
    assert tokenizer.vocab_size - len(tokenizer) < 64
    assert tokenizer.decode([*specials, *tokenizer.encode("x"), tokenizer.vocab_size - 1]) == "x"


def test_the_byte_tokenizer_is_fixed() -> None:
    assert BYTE.encode("é") == [0xC3, 0xA9]
    assert (BYTE.bos_id, BYTE.eos_id, BYTE.pad_id) == (256, 257, 258)
    assert (len(BYTE), BYTE.vocab_size) == (259, 320)
    assert BYTE.decode([0xC3]) == "\ufffd"


@both
def test_ids_may_be_arrays_or_tensors(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cat")
    assert tokenizer.decode(np.array(ids)) == "the cat"
    assert tokenizer.decode(torch.tensor(ids)) == "the cat"
    assert tokenizer.decode(iter(torch.tensor(ids))) == "the cat"


@both
@pytest.mark.parametrize("ids", [[-1], [1 << 40], [1.5], ["a"], [[1]], torch.zeros(1, 2), 3])
def test_what_is_no_id_is_refused(tokenizer: Tokenizer, ids: object) -> None:
    with pytest.raises(DataError, match="token id"):
        tokenizer.decode(ids)
    with pytest.raises(DataError, match="token id"):
        tokenizer.decode([tokenizer.vocab_size])


@both
@pytest.mark.parametrize("text", ["ok \ud800", None, b"bytes", 7])
def test_what_is_no_text_is_refused(tokenizer: Tokenizer, text: object) -> None:
    with pytest.raises(DataError, match=r"surrogate|encodes strings"):
        tokenizer.encode(text)
    with pytest.raises(DataError, match=r"surrogate|encodes strings"):
        tokenizer.encode_batch(["fine", text])


def test_a_lone_surrogate_is_located() -> None:
    with pytest.raises(DataError, match="character 3"):
        BYTE.encode("ok \ud800")


@both
@settings(deadline=None)
@given(text=texts, cut=st.integers(0, 200))
def test_streaming_equals_decoding_at_once(tokenizer: Tokenizer, text: str, cut: int) -> None:
    ids = tokenizer.encode(text)[cut:]  # the cut may begin inside a character
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


def test_streaming_holds_a_character_until_it_is_complete() -> None:
    stream = StreamDecoder(BYTE)
    assert [stream.push(i) for i in "a€b".encode()] == ["a", "", "", "€", "b"]
    assert stream.flush() == ""
    assert [stream.push(i) for i in "€".encode()[:2]] == ["", ""]
    assert stream.flush() == "\ufffd"
    assert stream.push(0xAC) + stream.flush() == "\ufffd"  # nothing left of the stream before


def test_streaming_keeps_the_spaces_of_sentencepiece_like_decoders() -> None:
    rust = RustTokenizer(models.BPE(vocab={"▁a": 0, "▁b": 1}, merges=[]))
    rust.decoder = decoders.Metaspace()
    tokenizer = module._RustBacked(rust, "metaspace", {})
    stream = StreamDecoder(tokenizer)
    ids = [tokenizer.bos_id, 0, 1, tokenizer.eos_id, 1]
    assert [stream.push(i) for i in ids] == ["", "a", " b", "", " b"]
    assert stream.flush() == ""
    assert stream.push(1) == "b"  # a new stream


class Chunks:
    """Decodes chunks of bytes that begin and end inside characters, as merged tokens may."""

    chunks = (b"a\xe2", b"\x82", b"\xac\xe2", b"\x82\xacb", b"\xff")

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.chunks[i] for i in ids).decode(errors="replace")


def test_streaming_gives_the_whole_characters_of_a_token_once() -> None:
    stream = StreamDecoder(Chunks())
    assert [stream.push(i) for i in range(5)] == ["a", "", "€", "€b", ""]
    assert stream.flush() == "\ufffd"


def test_bpe_compresses_and_is_reproducible() -> None:
    assert len(BPE.encode(CORPUS[0])) < len(CORPUS[0]) / 2
    assert BPETokenizer.train(iter(CORPUS), 320).fingerprint == BPE.fingerprint
    assert BPETokenizer.train(CORPUS[:1], 320).fingerprint != BPE.fingerprint
    assert len(BPETokenizer.train([], 259)) == 259


@pytest.mark.parametrize("vocab_size", [258, 0, -1, 300.0, "300"])
def test_bpe_needs_room_for_every_byte(vocab_size: object) -> None:
    with pytest.raises(ConfigError, match="259"):
        BPETokenizer.train(CORPUS, vocab_size)


@both
def test_saving_and_loading_keeps_everything(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path / "deep" / "er")
    loaded = load_tokenizer(tmp_path / "deep" / "er")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.name == tokenizer.name
    assert loaded.encode("the cat <|eos|>") == tokenizer.encode("the cat <|eos|>")
    assert get_vocab_size(tmp_path / "deep" / "er") == tokenizer.vocab_size


def test_a_saved_bpe_loads_as_bpe_and_in_transformers(tmp_path) -> None:
    from transformers import AutoTokenizer

    BPE.save(tmp_path)
    assert BPETokenizer.load(tmp_path).fingerprint == BPE.fingerprint
    hf = AutoTokenizer.from_pretrained(tmp_path)
    assert (hf.eos_token_id, hf.pad_token_id) == (BPE.eos_id, BPE.pad_id)
    assert hf.encode("the cat") == BPE.encode("the cat")


def test_saving_where_nothing_can_be_written(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentError_, match="saved"):
        BPE.save(tmp_path / "file" / "folder")


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


def test_bos_eos_and_pad_that_cannot_differ_are_refused(tmp_path) -> None:
    foreign("<|bos|>").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|bos|>"}')
    with pytest.raises(DataError, match="differ"):
        MythosTokenizer(tmp_path)


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


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "x.json"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(path: str) -> None:
    with pytest.raises(DataError, match="no tokenizer there"):
        load_tokenizer(path)


@pytest.mark.parametrize("name", ["", "  ", None, 3, "a\0b"])
def test_what_is_no_name_is_refused(name: object) -> None:
    with pytest.raises(ConfigError, match="name_or_path"):
        load_tokenizer(name)


def test_byte_is_the_byte_tokenizer() -> None:
    assert isinstance(load_tokenizer("byte"), ByteTokenizer)
    assert get_vocab_size("byte") == 320


def test_offline_says_what_to_do_within_seconds(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    began = time.monotonic()
    with pytest.raises(EnvironmentError_, match="HF_HUB_OFFLINE") as caught:
        MythosTokenizer("open-mythos/no-such-model")
    assert time.monotonic() - began < 20  # most of it is the import of transformers
    for advice in ("pip install open-mythos[hf]", "path", "ByteTokenizer"):
        assert advice in str(caught.value)


def test_an_unreachable_hub_is_noticed_without_retries(monkeypatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(module.urllib.request, "getproxies", dict)
    began = time.monotonic()
    with pytest.raises(EnvironmentError_, match=r"127\.0\.0\.1"):
        load_tokenizer("open-mythos/no-such-model")
    assert time.monotonic() - began < 20


def test_without_transformers_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EnvironmentError_, match=r"not installed[\s\S]*open-mythos\[hf\]"):
        load_tokenizer("openai/gpt-oss-20b")


def test_a_hub_tokenizer_is_taken_over_with_its_special_tokens(monkeypatch, tmp_path) -> None:
    from transformers import AutoTokenizer

    foreign("<|endoftext|>").save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    hf = AutoTokenizer.from_pretrained(tmp_path)
    asked = {}

    def from_pretrained(name: str, **options: object) -> object:
        asked.update(options, name=name)
        return hf

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    tokenizer = MythosTokenizer("some/model")
    assert asked == {"name": "some/model", "local_files_only": True, "trust_remote_code": False}
    assert tokenizer.eos_id == hf.eos_token_id
    assert tokenizer.name == "some/model"
    assert tokenizer.fingerprint == MythosTokenizer(tmp_path).fingerprint


def test_importing_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
        "from open_mythos.tokenizer import load_tokenizer; print(load_tokenizer('byte').vocab_size)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "320"
