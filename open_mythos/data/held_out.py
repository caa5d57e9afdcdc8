"""Windows of the held-out documents of a stream, for evaluation."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from open_mythos.checks import check_count, check_number, checked
from open_mythos.data.batch import Batch
from open_mythos.data.corpus import Corpus
from open_mythos.data.documents import documents_of, is_held_out
from open_mythos.errors import DataError
from open_mythos.tokenizer import Tokenizer


class TooFewHeldOutError(DataError):
    """The held-out documents do not fill one window."""


class HeldOutWindows:
    """Iterates over the first windows of the held-out documents, kept in memory.

    A document is held out by a hash of its text, as in :func:`~open_mythos.data.prepare`. The
    corpus is read from its start as far as needed, about ``windows * seq_len / held_out`` tokens.
    The windows depend neither on the batch nor on the number of processes of a run.

    Args:
        corpus: The text.
        tokenizer: The run's tokenizer.
        seq_len: T, the length of every sequence.
        windows: Sequences at most; fewer if the corpus is shorter.
        held_out: The share that the run's ``StreamLoader`` holds out; 1 takes every document, for
            a corpus that is only evaluated on.
        batch: Sequences per batch.
        mask_documents: Whether batches carry ``document_ids``.

    Raises:
        ConfigError: A number is out of range.
        TooFewHeldOutError: The held-out documents do not fill one window.
        DataError, EnvironmentError_: The corpus is damaged, or cannot be read.
    """

    @checked
    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        windows: int,
        held_out: float,
        batch: int,
        mask_documents: bool = False,
    ) -> None:
        self._batch = check_count("batch", batch)
        check_number("held_out", held_out, gt=0, le=1)
        wanted = check_count("windows", windows) * check_count("seq_len", seq_len) + 1
        ids: list[int] = []
        text_bytes = 0
        for text in documents_of(corpus):
            if text and is_held_out(text, held_out):
                ids += [*tokenizer.encode(text), tokenizer.eos_id]
                text_bytes += len(text.encode())
            if len(ids) >= wanted:
                break
        if len(ids) <= seq_len:
            raise TooFewHeldOutError(
                "the held-out documents do not fill one window", where=corpus.source,
                value=f"{len(ids)} tokens", allowed=f"at least seq_len + 1 = {seq_len + 1} tokens",
                fix="hold out a larger share, or lower seq_len",
            )  # fmt: skip
        self.bytes_per_token = text_bytes / len(ids)
        """Mean bytes of text per token: bits per byte = nats per token / (this * ln 2)."""
        self._ids = torch.tensor(ids[:wanted]).unfold(0, seq_len + 1, seq_len)  # (windows, T + 1)
        self._eos_id = tokenizer.eos_id if mask_documents else None

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self._ids) // self._batch)

    def __iter__(self) -> Iterator[Batch]:
        for index in torch.arange(len(self._ids)).split(self._batch):
            yield Batch.from_windows(self._ids[index], index, self._eos_id)
