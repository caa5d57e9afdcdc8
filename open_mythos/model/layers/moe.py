"""Mixture of fine-grained experts (DeepSeekMoE, arXiv 2401.06066)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from open_mythos.checks import check_number, checked
from open_mythos.config import MythosConfig
from open_mythos.devices import as_autocast
from open_mythos.model.context import Context
from open_mythos.model.init import init_weights
from open_mythos.model.layers.experts import Experts, Operands, RoutedExperts
from open_mythos.model.layers.feed_forward import Expert
from open_mythos.model.layers.float32 import in_float32
from open_mythos.model.trace import LoopTrace
from open_mythos.ops.experts.rows import expert_load


class Routing(NamedTuple):
    """Router decisions for N tokens."""

    scores_NE: Tensor
    """Scores of all experts, float32."""
    experts_NC: Tensor
    """Chosen experts, int64."""


class MoEFFN(nn.Module):
    """Top-k routed experts per token, plus always-on shared experts.

    Scores are float32 sigmoids. Experts are chosen by score + bias and weighted by score alone,
    renormalized over the chosen ones if top-k > 1. The bias balances the load without a gradient
    (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): call :meth:`update_bias` after each optimizer
    step with the load of all loops, which a :class:`LoopTrace` collects.
    """

    router_bias: Tensor
    experts: Experts
    """Computes the routed experts; may be replaced (:mod:`open_mythos.model.layers.experts`)."""
    is_transposed = True
    """The layout of the experts' weights is (E, in, out); PEFT reads it."""
    gate_up: nn.Parameter | None
    down: nn.Parameter | None

    @checked
    def __init__(self, cfg: MythosConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer = layer
        self.top_k = cfg.n_experts_per_tok
        self.experts = RoutedExperts(cfg.moe_backend)
        self.router = nn.Linear(cfg.dim, cfg.n_experts, bias=False)
        self.register_buffer("router_bias", torch.zeros(cfg.n_experts))
        self.gate_up = nn.Parameter(torch.empty(cfg.n_experts, cfg.dim, 2 * cfg.expert_dim))
        self.down = nn.Parameter(torch.empty(cfg.n_experts, cfg.expert_dim, cfg.dim))
        # n shared experts equal one feed-forward of their total width
        self.shared = Expert(cfg.dim, cfg.shared_dim) if cfg.n_shared_experts else None
        init_weights(self, cfg.dim)

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores (N, E), chosen experts (N, C) and weights (N, C); floats are float32."""
        return self.chosen(in_float32(self.router, x_ND).sigmoid())

    def chosen(self, scores_NE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what :meth:`route` returns for given scores."""
        experts_NC = (scores_NE + self.router_bias).topk(self.top_k, dim=-1, sorted=False).indices
        weights_NC = scores_NE.gather(-1, experts_NC)
        if self.top_k > 1:
            # with top-1 a renormalized weight would be 1: no gradient for the router
            total_N1 = weights_NC.sum(-1, keepdim=True)
            weights_NC = weights_NC / total_N1.clamp_min(torch.finfo(torch.float32).tiny)
        return scores_NE, experts_NC, weights_NC

    def forward(
        self,
        x_BTD: Tensor,
        ctx: Context | None = None,
        loop: int = 0,
        trace: LoopTrace | None = None,
        *,
        operands: Operands | None = None,
        with_routing: bool = False,
    ) -> Any:
        """Apply the mixture, (B, T, D) -> (B, T, D).

        Args:
            x_BTD: Tokens.
            ctx: Context of the call.
            loop: Loop index, for ``trace``.
            trace: Receives routing statistics.
            operands: Expert weights; :meth:`operands` by default.
            with_routing: Return (y_BTD, :class:`Routing`), independently of the loop index: one
                compiled graph serves all loops.
        """
        operands = self.operands(x_BTD, ctx) if operands is None else operands
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        scores_NE, experts_NC, weights_NC = self.route(x_ND)
        # cast once, for routed and shared experts; only the router reads float32
        x_ND = as_autocast(x_ND)
        exact = ctx is not None and ctx.exact
        experts = self.experts.exactly if exact else self.experts
        y_ND = experts(x_ND, experts_NC, weights_NC, *operands)
        if self.shared is not None:
            y_ND = y_ND + self.shared(x_ND)
        y_BTD, routing = y_ND.view_as(x_BTD), Routing(scores_NE, experts_NC)
        if trace is not None:
            record_routing(trace, self.layer, loop, routing, x_BTD, ctx)
        return (y_BTD, routing) if with_routing else y_BTD

    def operands(self, x_BTD: Tensor, ctx: Context | None) -> Operands:
        """Return the expert weights for a call on ``x_BTD``."""
        n_choices = x_BTD.numel() // x_BTD.shape[-1] * self.top_k
        memo = {} if ctx is None else ctx.memo
        return self.experts.operands((self.gate_up, self.down), n_choices, memo)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Keep the bias in float32: in bfloat16 it would stop at 0.5 under steps of 1e-3."""
        bias = self.router_bias
        result = super()._apply(*args, **kwargs)
        if self.router_bias.element_size() < bias.element_size():
            self.router_bias = bias.to(self.router_bias.device)
        return result

    @torch.no_grad()
    def update_bias(self, load_E: Tensor, speed: float | Tensor) -> None:
        """Move the bias by ``speed`` towards experts with less than the mean load.

        Args:
            load_E: Tokens per expert since the last update, over all loops (and all ranks).
            speed: Step size, or a scalar tensor; DeepSeek-V3 uses 1e-3.

        Raises:
            ConfigError: ``speed`` is negative or not finite.
        """
        if not isinstance(speed, Tensor):
            check_number("speed", speed, ge=0)
        load_E = load_E.to(self.router_bias.device)
        self.router_bias += speed * torch.sign(load_E.mean() - load_E)


def record_routing(
    trace: LoopTrace, layer: int, loop: int, routing: Routing, x_BTD: Tensor, ctx: Context | None
) -> None:
    """Record the routing of the tokens ``x_BTD`` in ``trace``; padding is no load."""
    scores_NE, experts_NC = routing
    valid = None if ctx is None or ctx.valid_BT is None else ctx.valid_BT.reshape(-1)
    shape = x_BTD.shape[:-1]
    trace.record_routing(
        layer, loop, expert_load(experts_NC, scores_NE.shape[-1], valid),
        scores_NE.view(*shape, scores_NE.shape[-1]),
        experts_NC.view(*shape, experts_NC.shape[-1]),
    )  # fmt: skip
