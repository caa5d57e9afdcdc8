"""Windows of the documents that a stream holds out, for evaluation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from open_mythos.checks import check_count
from open_mythos.data.batch import Batch
from open_mythos.data.packing import document_ids
from open_mythos.data.prepare import held_out_place
from open_mythos.data.stream_corpus import Corpus
from open_mythos.data.stream_read import documents_of
from open_mythos.errors import ConfigError, DataError
from open_mythos.tokenizer import Tokenizer


class TooFewHeldOutError(DataError):
    """The held-out documents do not fill one window."""


class HeldOutWindows:
    """Iterates over the first windows of the held-out documents, which are kept in memory.

    A document is held out by the hash of its text, as by :func:`~open_mythos.data.prepare`, so
    equal documents fall on the same side. The corpus is read from its start as far as needed, about
    ``windows * seq_len / held_out`` tokens. The windows do not depend on the batch or the number of
    processes of a run.

    Args:
        corpus: The text.
        tokenizer: That of the run.
        seq_len: T, the length of every sequence.
        windows: Sequences wanted; fewer if the corpus ends before.
        held_out: The share that the run's ``StreamLoader`` leaves out; 1 takes every document of a
            corpus that is for evaluation only.
        batch: Sequences at a time.
        mask_documents: Whether batches carry ``document_ids``.

    Raises:
        ConfigError: A number is out of range.
        TooFewHeldOutError: The held-out documents do not fill one window.
        DataError, EnvironmentError_: The corpus is damaged, or cannot be read.
    """

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
        self._seq_len, self._batch = check_count("seq_len", seq_len), check_count("batch", batch)
        if not 0 < held_out <= 1:
            raise ConfigError("no share", where="held_out", value=held_out, allowed="0 < x <= 1")
        wanted = check_count("windows", windows) * seq_len + 1
        ids: list[int] = []
        text_bytes = 0
        for text in held_out_documents(corpus, held_out):
            ids += [*tokenizer.encode(text), tokenizer.eos_id]
            text_bytes += len(text.encode())
            if len(ids) >= wanted:
                break
        self.bytes_per_token = text_bytes / max(1, len(ids))
        """Mean bytes of text per token: bits per byte = nats per token / (this * ln 2)."""
        self.windows = (min(len(ids), wanted) - 1) // seq_len
        """Number of sequences."""
        if self.windows < 1:
            raise TooFewHeldOutError(
                "the held-out documents do not fill one window", where=corpus.source,
                value=f"{len(ids)} tokens", allowed=f"seq_len + 1 = {seq_len + 1} tokens or more",
                fix="hold out a larger share, or lower seq_len",
            )  # fmt: skip
        self._ids = torch.from_numpy(np.array(ids[:wanted], np.int64))
        self._eos_id = tokenizer.eos_id if mask_documents else None

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-self.windows // self._batch)

    def __iter__(self) -> Iterator[Batch]:
        length = self._seq_len
        for first in range(0, self.windows, self._batch):
            index = torch.arange(first, min(first + self._batch, self.windows))
            rows = [self._ids[i * length : (i + 1) * length + 1] for i in index.tolist()]
            inputs_BT, targets_BT = torch.stack(rows)[:, :-1], torch.stack(rows)[:, 1:]
            masks = None if self._eos_id is None else document_ids(inputs_BT, self._eos_id)
            yield Batch(inputs_BT.contiguous(), targets_BT.contiguous(), masks, index)


def held_out_documents(corpus: Corpus, share: float) -> Iterator[str]:
    """Read the held-out documents of ``corpus`` that are not empty, file by file.

    Raises:
        DataError, EnvironmentError_: As of :func:`~open_mythos.data.stream_read.read_unit`.
    """
    for text in documents_of(corpus):
        if text and held_out_place(text.encode()) < share:
            yield text
