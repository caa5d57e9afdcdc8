"""The mixture of fine-grained experts (DeepSeekMoE, arXiv 2401.06066)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.devices import as_autocast
from open_mythos.model.context import Context
from open_mythos.model.init import init_weights
from open_mythos.model.layers.feed_forward import Expert
from open_mythos.model.trace import LoopTrace
from open_mythos.ops.experts.routed import LoopedStack, deferring_pays, expert_load, routed_experts

Stacks = tuple[Tensor | LoopedStack, Tensor | LoopedStack]
"""Gate and up projections of all experts, and their down projections, as one call uses them."""


class Routing(NamedTuple):
    """What the router decided for N tokens."""

    scores_NE: Tensor
    """Score of every expert, float32."""
    experts_NC: Tensor
    """Chosen experts, int64."""


class MoEFFN(nn.Module):
    """Routed experts chosen per token, plus shared experts that see every token.

    Scores are sigmoids in float32. The choice of experts uses score + bias, their weights the score
    alone, renormalised over the chosen ones if there are several. The bias balances the load
    without a gradient (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): call :meth:`update_bias`
    after each optimizer step with the load of all loops, which a :class:`LoopTrace` collects.

    Usable in any model: only ``dim``, ``n_experts``, ``n_experts_per_tok``, ``expert_dim``,
    ``n_shared_experts`` and ``moe_backend`` of the configuration are read.
    """

    router_bias: Tensor

    def __init__(self, cfg: MythosConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer = layer
        self.top_k = cfg.n_experts_per_tok
        self.backend = cfg.moe_backend
        self.router = nn.Linear(cfg.dim, cfg.n_experts, bias=False)
        self.register_buffer("router_bias", torch.zeros(cfg.n_experts))
        self.gate_up = nn.Parameter(torch.empty(cfg.n_experts, cfg.dim, 2 * cfg.expert_dim))
        self.down = nn.Parameter(torch.empty(cfg.n_experts, cfg.expert_dim, cfg.dim))
        # n shared experts side by side are one feed-forward of their summed width
        self.shared = Expert(cfg.dim, cfg.shared_dim) if cfg.n_shared_experts else None
        init_weights(self, cfg.dim)

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (N, E), chosen experts (N, C) and weights (N, C); scores and weights float32."""
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.float(), self.router.weight.float())
        scores_NE = logits_NE.sigmoid()
        experts_NC = (scores_NE + self.router_bias).topk(self.top_k, dim=-1, sorted=False).indices
        weights_NC = scores_NE.gather(-1, experts_NC)
        if self.top_k > 1:
            # a single weight renormalised would be 1, and the router would learn nothing
            total_N1 = weights_NC.sum(-1, keepdim=True)
            weights_NC = weights_NC / total_N1.clamp_min(torch.finfo(torch.float32).tiny)
        return scores_NE, experts_NC, weights_NC

    def forward(
        self,
        x_BTD: Tensor,
        ctx: Context | None = None,
        loop: int = 0,
        trace: LoopTrace | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D); routing statistics go to ``trace``."""
        y_BTD, routing = self.compute(x_BTD, self.stacks(x_BTD, ctx))
        if trace is not None:
            self.record(routing, x_BTD, ctx, loop, trace)
        return y_BTD

    def compute(self, x_BTD: Tensor, stacks: Stacks | None) -> tuple[Tensor, Routing]:
        """:meth:`forward` and what the router decided: tensors in, tensors out.

        Nothing here depends on the loop, so one compiled graph serves all of them.

        Args:
            x_BTD: Tokens.
            stacks: What :meth:`stacks` returned.
        """
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        scores_NE, experts_NC, weights_NC = self.route(x_ND)
        # once for experts and shared expert; the router alone reads float32
        x_ND = as_autocast(x_ND)
        y_ND = self.mix(x_ND, experts_NC, weights_NC, stacks)
        if self.shared is not None:
            y_ND = y_ND + self.shared(x_ND)
        return y_ND.view_as(x_BTD), Routing(scores_NE, experts_NC)

    def record(
        self, routing: Routing, x_BTD: Tensor, ctx: Context | None, loop: int, trace: LoopTrace
    ) -> None:
        """Note the router's decisions for the tokens ``x_BTD`` in ``trace``."""
        scores_NE, experts_NC = routing
        valid = None if ctx is None or ctx.valid_BT is None else ctx.valid_BT.reshape(-1)
        trace.record_routing(
            self.layer,
            loop,
            expert_load(experts_NC, scores_NE.shape[-1], valid),
            scores_NE.view(*x_BTD.shape[:-1], scores_NE.shape[-1]),
            experts_NC.view(*x_BTD.shape[:-1], self.top_k),
        )

    def mix(
        self, x_ND: Tensor, experts_NC: Tensor, weights_NC: Tensor, stacks: Stacks | None
    ) -> Tensor:
        """(N, D): what the chosen experts (N, C) make of each token, added by weight (N, C)."""
        assert stacks is not None
        return routed_experts(x_ND, *stacks, experts_NC, weights_NC, backend=self.backend)

    def stacks(self, x_BTD: Tensor, ctx: Context | None) -> Stacks | None:
        """The experts' weights as a call on ``x_BTD`` should use them.

        None where :meth:`mix` was replaced by something with weights of its own: experts in other
        processes, or packed ones.
        """
        if "mix" in vars(self) or type(self).mix is not MoEFFN.mix:
            return None
        if ctx is None:
            return as_autocast(self.gate_up), as_autocast(self.down)
        gate_up, down = ctx.cast(self.gate_up), ctx.cast(self.down)
        n_choices = x_BTD.numel() // x_BTD.shape[-1] * self.top_k
        if deferring_pays(n_choices, gate_up, down, self.backend):
            return ctx.looped(self.gate_up), ctx.looped(self.down)
        return gate_up, down

    @torch.no_grad()
    def update_bias(self, load_E: Tensor, speed: float) -> None:
        """Move the bias by ``speed`` towards the experts below the mean load.

        Args:
            load_E: Tokens per expert since the last update, over all loops (and all ranks).
            speed: Step size; DeepSeek-V3 uses 1e-3.
        """
        load_E = load_E.to(self.router_bias.device)
        self.router_bias += speed * torch.sign(load_E.mean() - load_E)
