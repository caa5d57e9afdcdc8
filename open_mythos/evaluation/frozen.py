"""Shared parts of all evaluations: model state, units, the error of an empty data set."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from open_mythos.devices import autocast
from open_mythos.errors import DataError
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.mode import evaluating


@contextmanager
def frozen(model: CausalLM, dtype: torch.dtype) -> Iterator[torch.device]:
    """Evaluate without gradients, with matmuls in ``dtype``; yields the model's device."""
    device = model.final_norm.weight.device
    with evaluating(model), torch.no_grad(), autocast(device, dtype):
        yield device


def bits_per_byte(loss: float, bytes_per_token: float | None) -> float | None:
    """Convert nats per token to bits per byte; None when the bytes are not known."""
    return None if bytes_per_token is None else loss / bytes_per_token / math.log(2)


def no_targets() -> DataError:
    """Return the error of batches without targets."""
    return DataError(
        "nothing to evaluate on", where="batches", value="no tokens to predict",
        allowed="at least one target", fix="check that the validation split is not empty",
    )  # fmt: skip
