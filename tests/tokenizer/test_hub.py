"""Tokenizers of the Hugging Face hub, mostly without it."""

import json
import sys

import pytest
from huggingface_hub import constants

from open_mythos.errors import EnvironmentError_
from open_mythos.tokenizer import MythosTokenizer, load_tokenizer
from tokenizer.samples import foreign


def test_offline_says_what_to_do(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentError_, match="HF_HUB_OFFLINE") as caught:
        MythosTokenizer("open-mythos/no-such-model")
    for advice in ("pip install open-mythos[hf]", "path", "ByteTokenizer"):
        assert advice in str(caught.value)


def test_an_unreachable_hub_is_noticed_without_retries(monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(EnvironmentError_, match=r"127\.0\.0\.1"):
        load_tokenizer("open-mythos/no-such-model")


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
