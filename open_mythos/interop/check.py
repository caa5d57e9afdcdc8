"""Loss of a retrofitted model on a text, by depth, beside that of the dense model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from open_mythos.data import Batch
from open_mythos.errors import DataError
from open_mythos.evaluation import evaluate_depths
from open_mythos.files import MAX_TEXT_BYTES, read_text
from open_mythos.model.dense import DenseTransformer
from open_mythos.model.mythos import OpenMythos
from open_mythos.tokenizer import Tokenizer

DEPTHS = (1, 2, 4, 8)
CHECK_TOKENS = 1024
"""Tokens of ``retrofit --check`` at most."""


@dataclass(frozen=True)
class TextCheck:
    """Mean loss over a text in nats per token.

    Attributes:
        tokens: Predicted tokens.
        dense: Loss of the dense model.
        losses: Loops -> loss of the looped model.
    """

    tokens: int
    dense: float
    losses: dict[int, float]


def check_text(
    dense: DenseTransformer,
    looped: OpenMythos,
    tokenizer: Tokenizer | None,
    text: str,
    depths: Sequence[int] = DEPTHS,
    most: int = 512,
) -> TextCheck:
    """Measure both models on the first ``most`` tokens of a text, or of the file it names.

    Raises:
        DataError: There is no tokenizer, or the text is too short.
    """
    if tokenizer is None:
        raise DataError(
            "the model has no tokenizer",
            where="--check",
            value=text,
            allowed="a model with a tokenizer",
            fix="leave out --check",
        )
    content = text
    if os.path.isfile(text):
        try:
            content = read_text(Path(text))
        except (OSError, ValueError) as error:
            raise DataError(
                "the text cannot be read", where="--check", value=str(error),
                allowed=f"UTF-8 of at most {MAX_TEXT_BYTES:,} bytes", fix="pass another file",
            ) from error  # fmt: skip
    ids = tokenizer.encode(content)[: min(most, dense.cfg.max_seq_len) + 1]
    if len(ids) < 2:
        raise DataError(
            "the text is too short", where="--check", value=content[:50],
            allowed="at least two tokens", fix="pass a longer text, or a file",
        )  # fmt: skip
    batch = Batch.from_windows(torch.tensor([ids]), torch.zeros(1, dtype=torch.long), None)
    (before,) = evaluate_depths(dense, [batch], [])
    rows = evaluate_depths(looped, [batch], depths)
    losses = {row.depth: row.loss for row in rows if row.depth is not None}
    return TextCheck(before.tokens, before.loss, losses)
