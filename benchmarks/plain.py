"""Plain implementation of a model: straightforward code from the library's own parts.

- experts: a Python loop, one after the other, over the tokens that chose each
- latent attention: every step expands the whole history into keys and values of every head
- cache: concatenated at every token

:func:`common_parts` is the model without the parts that differ: a lower bound on the fast time.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import sharing
from open_mythos.model.active import Active
from open_mythos.model.cache import KVCache
from open_mythos.model.context import Context
from open_mythos.model.layers.experts import Experts, Operands, RoutedExperts, Weights
from open_mythos.model.layers.mla import MLAttention
from open_mythos.model.layers.moe import MoEFFN
from open_mythos.model.mythos import OpenMythos


class ExpandingMLA(MLAttention):
    """Latent attention that expands its history at every step."""

    def absorbing_is_cheaper(self, n_new: int, n_all: int) -> bool:
        return False


class ConcatenatingCache(KVCache):
    """Cache that concatenates a new slot at every write; whole batches only."""

    def write(
        self, layer: int, loop: int | Tensor, entry_BTW: Tensor, active: Active | None = None
    ) -> Tensor:
        assert active is None
        held = self._slots.get((layer, loop))
        grown = entry_BTW if held is None else torch.cat((held, entry_BTW), dim=1)
        self._slots[layer, loop] = grown
        return grown


def plain_twin(model: OpenMythos) -> OpenMythos:
    """Return a copy of ``model`` that uses the plain implementations."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, MoEFFN):
            module.experts = RoutedExperts("reference")
        if isinstance(module, MLAttention):
            module.__class__ = ExpandingMLA  # the weights stay, one method changes
    return twin


class ChoiceByChoice(Experts):
    """Naive experts: a loop over choices and experts, on the tokens of each pair.

    Experts are weights of their own, not one stack; here they share the memory of ``layer``'s.
    """

    def __init__(self, layer: MoEFFN) -> None:
        super().__init__()
        assert layer.gate_up is not None
        assert layer.down is not None
        self.gate_up, self.down = (
            nn.ParameterList(nn.Parameter(each) for each in stack.detach())
            for stack in (layer.gate_up, layer.down)
        )

    def operands(self, weights: Weights, n_choices: int, memo: dict[Any, Any]) -> Operands:
        return self.gate_up, self.down

    def forward(
        self, x_ND: Tensor, experts_NC: Tensor, weights_NC: Tensor, gate_up: Any, down: Any
    ) -> Tensor:
        """Sum the results of all choices of each token."""
        out_ND = torch.zeros_like(x_ND)
        for chosen_N, weight_N in zip(experts_NC.T, weights_NC.T, strict=True):
            for expert, (gate_up_DF, down_FD) in enumerate(zip(gate_up, down, strict=True)):
                of_expert = chosen_N == expert
                if of_expert.any():
                    gate, up = (x_ND[of_expert] @ gate_up_DF).chunk(2, dim=-1)
                    weight = weight_N[of_expert].unsqueeze(-1).to(x_ND.dtype)
                    out_ND[of_expert] += weight * ((F.silu(gate) * up) @ down_FD)
        return out_ND


class NoExperts(Experts):
    """Skip the routed experts."""

    def operands(self, weights: Weights, n_choices: int, memo: dict[Any, Any]) -> Operands:
        return None, None

    def forward(
        self, x_ND: Tensor, experts_NC: Tensor, weights_NC: Tensor, gate_up: Any, down: Any
    ) -> Tensor:
        return x_ND * weights_NC[:, :1].to(x_ND.dtype)


class NoHistory(MLAttention):
    """Latent attention that projects query and entry, and skips the attention itself."""

    def forward(self, x_BTD: Tensor, ctx: Context | None = None, loop: int = 0) -> Tensor:
        assert ctx is not None
        self.entry(x_BTD, ctx.rope)
        q_BTHK = self.query(x_BTD, ctx.rope)
        return self.out_proj(q_BTHK[..., : self.cfg.v_head_dim].flatten(2))


def common_parts(model: OpenMythos, *, attention: bool) -> OpenMythos:
    """Return ``model``, sharing weights, without routed experts and optionally attention."""
    rest = sharing(model)
    for module in rest.modules():
        if isinstance(module, MoEFFN):
            module.experts = NoExperts()
        if attention and isinstance(module, MLAttention):
            module.__class__ = NoHistory
    return rest
