"""Whether the weights of a model are those of an earlier time."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import chain

import torch
from torch import nn


@torch.no_grad()
def weights_mark(model: nn.Module) -> Hashable:
    """Return a value that changes with the weights, at the cost of a few microseconds each.

    PyTorch counts changes of a tensor, but neither those of fused optimizers nor those through
    ``.data``: for these, the first element of each tensor is looked at.
    """
    tensors = [x for x in chain(model.parameters(), model.buffers()) if x.numel()]
    counts = tuple(0 if x.is_inference() else x._version for x in tensors)
    firsts = [x.detach().flatten()[0].double() for x in tensors]
    return counts, tuple(torch.stack(firsts).tolist())
