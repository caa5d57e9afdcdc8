"""Small prepared folders."""

from pathlib import Path

import pytest

from open_mythos.data import TokenShards, prepare
from open_mythos.tokenizer import ByteTokenizer

DOCUMENTS = [f"document {i}: " + "lorem ipsum " * (i % 7) + "é" * (i % 3) for i in range(120)]


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """The documents of ``folder``."""
    return DOCUMENTS


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A prepared folder of several shards; never to be changed by a test."""
    out = tmp_path_factory.mktemp("data") / "folder"
    prepare(DOCUMENTS, out, ByteTokenizer(), shard_tokens=500, val_fraction=0.1)
    return out


@pytest.fixture(scope="session")
def shards(folder) -> TokenShards:
    """The training split of ``folder``."""
    return TokenShards(folder)
