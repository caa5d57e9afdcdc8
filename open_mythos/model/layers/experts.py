"""Implementations of :attr:`MoEFFN.experts`, which computes the routed experts.

:class:`RoutedExperts` here, :class:`~open_mythos.train.parallel.expert_parallel.ExpertParallel` and
:class:`~open_mythos.inference.quantization.PackedExperts`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from open_mythos.devices import as_autocast, autocast_dtype
from open_mythos.errors import ConfigError
from open_mythos.ops.experts.looped_stack import LoopedStack
from open_mythos.ops.experts.routed import deferring_pays, routed_experts

Operands = tuple[Any, Any]
"""Gate-up and down projections of one loop: tensors, ``LoopedStack`` or packed weights."""
Weights = tuple[nn.Parameter | None, nn.Parameter | None]
"""(E, D, 2F) gate-up and (E, F, D) down projections; None if the experts own their weights."""


class Experts(nn.Module):
    """Base of all implementations of routed experts: weights for a loop, and their application."""

    def operands(self, weights: Weights, n_choices: int, memo: dict[Any, Any]) -> Operands:
        """Return the weights for one loop.

        Args:
            weights: ``gate_up`` and ``down`` of the mixture.
            n_choices: Tokens times experts per token.
            memo: Cache of the call, shared by all loops and mixtures.
        """
        raise NotImplementedError

    def exactly(
        self, x_ND: Tensor, experts_NC: Tensor, weights_NC: Tensor, gate_up: Any, down: Any
    ) -> Tensor:
        """Compute the same as a call, with bits of a token that do not depend on other tokens.

        Raises:
            ConfigError: This implementation cannot.
        """
        raise ConfigError(
            "these experts have no exact form", where="Context.exact", value=type(self).__name__,
            allowed="experts that are neither quantized nor distributed",
            fix="call the model without exact",
        )  # fmt: skip


class RoutedExperts(Experts):
    """Experts whose weights are all on this process.

    Args:
        backend: See :func:`~open_mythos.ops.experts.routed.routed_experts`.
    """

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend

    def operands(self, weights: Weights, n_choices: int, memo: dict[Any, Any]) -> Operands:
        """Cast to the autocast dtype and, where that pays, defer the weight gradient.

        Done once per call, because autocast caches no casts for grouped matmuls.
        """
        gate_up, down = weights
        assert gate_up is not None
        assert down is not None
        dtype = autocast_dtype(down.device)
        key = self, torch.is_grad_enabled(), dtype
        if key not in memo:
            memo[key] = as_autocast(gate_up), as_autocast(down)
        cast: Operands = memo[key]
        if not deferring_pays(n_choices, *cast, self.backend):
            return cast
        key_of_stacks = *key, LoopedStack
        if key_of_stacks not in memo:
            # they compute one weight gradient for all loops
            memo[key_of_stacks] = LoopedStack(gate_up, cast[0]), LoopedStack(down, cast[1])
        return memo[key_of_stacks]

    def forward(
        self, x_ND: Tensor, experts_NC: Tensor, weights_NC: Tensor, gate_up: Any, down: Any
    ) -> Tensor:
        """Sum over the chosen experts (N, C) of weight (N, C) times expert output, (N, D)."""
        call = x_ND, gate_up, down, experts_NC, weights_NC
        return routed_experts(*call, backend=self.backend)

    def exactly(
        self, x_ND: Tensor, experts_NC: Tensor, weights_NC: Tensor, gate_up: Any, down: Any
    ) -> Tensor:
        """Compute the experts in matmuls of one size; see :meth:`Experts.exactly`."""
        call = x_ND, gate_up, down, experts_NC, weights_NC
        return routed_experts(*call, backend="tiles")
