"""The conditions under which every measurement here is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from open_mythos.devices import autocast
from open_mythos.model.causal_lm import CausalLM


@contextmanager
def frozen(model: CausalLM, dtype: torch.dtype) -> Iterator[torch.device]:
    """Evaluation mode, no gradients, products in ``dtype``; yields the model's device."""
    device, was_training = model.head.weight.device, model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(device, dtype):
            yield device
    finally:
        model.train(was_training)
