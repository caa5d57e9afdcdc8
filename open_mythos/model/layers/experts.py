"""Implementations of :attr:`MoEFFN.experts`, which computes the routed experts.

:class:`RoutedExperts` here, :class:`~open_mythos.train.parallel.expert_parallel.ExpertParallel` and
:class:`~open_mythos.inference.quantization.PackedExperts`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from open_mythos.devices import as_autocast
from open_mythos.ops.experts.looped_stack import LoopedStack
from open_mythos.ops.experts.routed import deferring_pays, routed_experts

Operands = tuple[Any, Any]
"""Gate-up and down projections of one loop: tensors, ``LoopedStack`` or packed weights."""


class Mixture(Protocol):
    """Weights of the mixture that experts read."""

    router_bias: Tensor

    @property
    def gate_up(self) -> nn.Parameter | None:
        """(E, D, 2F); None if the experts own their weights."""

    @property
    def down(self) -> nn.Parameter | None:
        """(E, F, D); None if the experts own their weights."""


class Experts(nn.Module):
    """Base of all implementations of routed experts."""

    def operands(self, moe: Mixture, n_choices: int, memo: dict[Any, Any]) -> Operands:
        """Return the weights for one loop.

        Args:
            moe: The mixture.
            n_choices: Tokens times experts per token.
            memo: Cache of the call, shared by all loops and mixtures.
        """
        raise NotImplementedError

    def forward(
        self, x_ND: Tensor, experts_NC: Tensor, weights_NC: Tensor, gate_up: Any, down: Any
    ) -> Tensor:
        """Sum over the chosen experts (N, C) of weight (N, C) times expert output, (N, D)."""
        raise NotImplementedError


class RoutedExperts(Experts):
    """Experts whose weights are all on this process.

    Args:
        backend: See :func:`~open_mythos.ops.experts.routed.routed_experts`.
    """

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend

    def operands(self, moe: Mixture, n_choices: int, memo: dict[Any, Any]) -> Operands:
        """Cast to the autocast dtype and, where that pays, defer the weight gradient.

        Done once per call, because autocast caches no casts for grouped matmuls. The memo holds
        the weights, so their keys stay unique.
        """
        device = moe.router_bias.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = self, torch.is_grad_enabled(), dtype
        if key not in memo:
            assert moe.gate_up is not None
            assert moe.down is not None
            memo[key] = _CallWeights(moe.gate_up, moe.down)
        weights: _CallWeights = memo[key]
        defers = deferring_pays(n_choices, *weights.cast, self.backend)
        return weights.deferred if defers else weights.cast

    def forward(
        self, x_ND: Tensor, experts_NC: Tensor, weights_NC: Tensor, gate_up: Any, down: Any
    ) -> Tensor:
        """Sum over the chosen experts (N, C) of weight (N, C) times expert output, (N, D)."""
        call = x_ND, gate_up, down, experts_NC, weights_NC
        return routed_experts(*call, backend=self.backend)


class _CallWeights:
    """Expert weights for all loops of one call, in one grad mode and one dtype."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        self.weights = gate_up, down
        self.cast = as_autocast(gate_up), as_autocast(down)

    @cached_property
    def deferred(self) -> tuple[LoopedStack, LoopedStack]:
        """Stacks that compute one weight gradient for all loops."""
        gate_up, down = zip(self.weights, self.cast, strict=True)
        return LoopedStack(*gate_up), LoopedStack(*down)
