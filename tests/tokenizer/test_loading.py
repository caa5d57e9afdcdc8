"""Tokenizers by name, and what importing them loads."""

import subprocess
import sys

import pytest

from open_mythos.errors import ConfigError, DataError
from open_mythos.tokenizer import ByteTokenizer, Tokenizer, get_vocab_size, load_tokenizer
from tokenizer.samples import both


def test_byte_is_the_byte_tokenizer() -> None:
    assert isinstance(load_tokenizer("byte"), ByteTokenizer)
    assert get_vocab_size("byte") == 320


@both
def test_saving_and_loading_keeps_everything(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path / "deep" / "er")
    loaded = load_tokenizer(tmp_path / "deep" / "er")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.name == tokenizer.name
    assert loaded.encode("the cat <|eos|>") == tokenizer.encode("the cat <|eos|>")
    assert get_vocab_size(tmp_path / "deep" / "er") == tokenizer.vocab_size


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "x.json"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(path: str) -> None:
    with pytest.raises(DataError, match="no tokenizer there"):
        load_tokenizer(path)


@pytest.mark.parametrize("name", ["", "  ", None, 3, "a\0b"])
def test_invalid_names_are_rejected(name: object) -> None:
    with pytest.raises(ConfigError, match="name_or_path"):
        load_tokenizer(name)


def test_importing_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
        "from open_mythos.tokenizer import load_tokenizer; print(load_tokenizer('byte').vocab_size)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "320"
