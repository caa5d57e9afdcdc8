"""Calls of a module in float32, whatever the dtype of its weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from open_mythos.devices import at_least_float32, no_autocast


def in_float32(module: nn.Module, x: Tensor) -> Tensor:
    """Call ``module``, wrappers such as adapters included, with weights and input in float32.

    What is float64 stays so.
    """
    with no_autocast(x.device):
        weights = dict(module.named_parameters())
        if all(weight.dtype == torch.float32 for weight in weights.values()):
            return module(at_least_float32(x))
        upcast = {name: at_least_float32(weight) for name, weight in weights.items()}
        return functional_call(module, upcast, (at_least_float32(x),))
