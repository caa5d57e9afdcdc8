"""The plain form of a model: what one would write first, made of the library's own parts.

- experts: a Python loop, one after the other, over the tokens that chose each
- latent attention: every step expands the whole history into keys and values of every head
- cache: concatenated anew at every token
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from open_mythos.cache import KVCache
from open_mythos.layers.mla import MLAttention
from open_mythos.layers.moe import MoEFFN
from open_mythos.model import OpenMythos


class ExpandingMLA(MLAttention):
    """Latent attention that never leaves its history latent."""

    def absorbing_is_cheaper(self, n_new: int, n_all: int) -> bool:
        return False


class ConcatenatingCache(KVCache):
    """A cache whose slots are made anew at every write; whole batches only."""

    def write(
        self, layer: int, loop: int, entry_BTW: Tensor, rows_B: Tensor | None = None
    ) -> Tensor:
        assert rows_B is None
        held = self._slots.get((layer, loop))
        grown = entry_BTW if held is None else torch.cat((held, entry_BTW), dim=1)
        self._slots[layer, loop] = grown
        return grown


def plain_twin(model: OpenMythos) -> OpenMythos:
    """A copy of ``model`` with the same weights that computes everything the plain way."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, MoEFFN):
            module.backend = "reference"
        if isinstance(module, MLAttention):
            module.__class__ = ExpandingMLA  # the weights stay, one method changes
    return twin
