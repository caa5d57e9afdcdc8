"""Held-out documents: the complement of the stream, as evaluation windows."""

from __future__ import annotations

import json

import pytest

from open_mythos.data import Corpus, HeldOutWindows, StreamLoader, TooFewHeldOutError, open_corpus
from open_mythos.errors import ConfigError
from open_mythos.tokenizer import ByteTokenizer

TEXTS = [f"<{i}> words and words" for i in range(300)]


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    lines = (json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "a.jsonl").write_text("".join(lines))
    return open_corpus(tmp_path)


def test_held_out_documents_are_the_complement_of_the_stream(corpus) -> None:
    tokenizer = ByteTokenizer()
    options = {"seq_len": 32, "held_out": 0.2}
    held_out = HeldOutWindows(corpus, tokenizer, windows=1000, batch=4, **options)
    loader = StreamLoader(corpus, tokenizer, global_batch=1, **options)
    read: list[int] = []
    while loader.epoch < 1:
        read += next(loader).input_ids[0].tolist()
    kept = [t for batch in held_out for row in batch.input_ids.tolist() for t in row]

    def documents(tokens: list[int]) -> set[str]:
        text = tokenizer.decode([10 if t == tokenizer.eos_id else t for t in tokens])
        return set(text.split("\n")[:-1]) & set(TEXTS)

    # the last window may end inside a held-out document
    assert len(set(TEXTS) - documents(read) - documents(kept)) <= 1
    assert not documents(read) & documents(kept)
    assert 30 <= len(documents(kept)) <= 90
    windows = sum(len(batch) for batch in held_out)
    assert len(list(held_out)) == len(held_out) == -(-windows // 4)
    tokens = sum(len(text) + 1 for text in documents(kept))
    assert held_out.bytes_per_token == pytest.approx(1 - len(documents(kept)) / tokens, abs=0.01)


def test_held_out_windows_stop_at_the_wanted_number(corpus) -> None:
    few = HeldOutWindows(
        corpus, ByteTokenizer(), seq_len=32, windows=3, held_out=0.2, batch=2, mask_documents=True
    )
    sizes = [len(batch) for batch in few]
    assert sizes == [2, 1]
    assert all(batch.document_ids is not None for batch in few)
    with pytest.raises(TooFewHeldOutError, match="do not fill one window"):
        HeldOutWindows(corpus, ByteTokenizer(), seq_len=9999, windows=1, held_out=0.1, batch=1)
    with pytest.raises(ConfigError, match="held_out"):
        HeldOutWindows(corpus, ByteTokenizer(), seq_len=8, windows=1, held_out=0.0, batch=1)
