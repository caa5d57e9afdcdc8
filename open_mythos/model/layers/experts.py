"""How a mixture computes its routed experts: what :attr:`MoEFFN.experts` may be.

The mixture owns router, weights and shared expert; its ``experts`` multiply. There are three:
:class:`RoutedExperts` here, :class:`~open_mythos.train.parallel.expert_parallel.ExpertParallel` for
experts distributed over processes, and
:class:`~open_mythos.inference.quantization.PackedExperts` for quantized ones.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from open_mythos.devices import as_autocast
from open_mythos.ops.experts.routed import LoopedStack, deferring_pays, routed_experts

Operands = tuple[Any, Any]
"""Gate and up projections, and down projections, as one loop uses them: tensors,
:class:`~open_mythos.ops.experts.routed.LoopedStack` or packed weights."""


class Mixture(Protocol):
    """What experts read of the mixture that owns the weights."""

    router_bias: Tensor

    @property
    def gate_up(self) -> nn.Parameter | None:
        """(E, D, 2F); None if the experts have weights of their own."""

    @property
    def down(self) -> nn.Parameter | None:
        """(E, F, D); None if the experts have weights of their own."""


class Experts(nn.Module):
    """Base of all ways to compute routed experts."""

    def operands(self, moe: Mixture, n_choices: int, memo: dict[Any, Any]) -> Operands:
        """Return the weights as this loop should use them.

        Args:
            moe: The mixture.
            n_choices: Tokens times experts per token.
            memo: Kept by the call for all its loops, and shared between all mixtures.
        """
        raise NotImplementedError

    def forward(
        self, x_ND: Tensor, experts_NC: Tensor, weights_NC: Tensor, gate_up: Any, down: Any
    ) -> Tensor:
        """Sum over the chosen experts (N, C) of weight (N, C) times expert output, (N, D)."""
        raise NotImplementedError


class RoutedExperts(Experts):
    """Experts whose weights are all in this process.

    Args:
        backend: Of :func:`~open_mythos.ops.experts.routed.routed_experts`.
    """

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend

    def operands(self, moe: Mixture, n_choices: int, memo: dict[Any, Any]) -> Operands:
        """Cast to the autocast dtype and, where that pays, defer the weight gradient.

        Both happen once per call: autocast caches casts for the matmuls that it knows, and grouped
        matmuls are not among them. The memo holds the weights, so that no other tensor can take
        their place in it, and the first weights of a call serve all its loops.
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
        """The stacks that compute one weight gradient for all loops."""
        gate_up, down = zip(self.weights, self.cast, strict=True)
        return LoopedStack(*gate_up), LoopedStack(*down)
