"""The plain form of a model: what one would write first, made of the library's own parts.

- experts: a Python loop, one after the other, over the tokens that chose each
- latent attention: every step expands the whole history into keys and values of every head
- cache: concatenated anew at every token

:func:`common_parts` is the model without what the two forms do differently. Its time is what no
fast form can save.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from benchmarks.models import sharing
from open_mythos.cache import KVCache, Places
from open_mythos.context import Context
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
        self, layer: int, loop: int, entry_BTW: Tensor, places: Places | None = None
    ) -> Tensor:
        assert places is None
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


class NoExperts(MoEFFN):
    """A mixture that routes and then leaves its routed experts out."""

    def mix(self, x_ND: Tensor, experts_NC: Tensor, weights_NC: Tensor, *_: object) -> Tensor:
        return x_ND * weights_NC[:, :1].to(x_ND.dtype)


class NoHistory(MLAttention):
    """Latent attention that makes its query and its entry, and looks at nothing."""

    def forward(self, x_BTD: Tensor, ctx: Context | None = None, loop: int = 0) -> Tensor:
        assert ctx is not None
        self.entry(x_BTD, ctx.rope)
        q_BTHK = self.query(x_BTD, ctx.rope)
        return self.out_proj(q_BTHK[..., : self.cfg.v_head_dim].flatten(2))


def common_parts(model: OpenMythos, *, attention: bool) -> OpenMythos:
    """``model``, its weights shared, without routed experts; without attention too if told so."""
    rest = sharing(model)
    for module in rest.modules():
        if isinstance(module, MoEFFN):
            module.__class__ = NoExperts
        if attention and isinstance(module, MLAttention):
            module.__class__ = NoHistory
    return rest
