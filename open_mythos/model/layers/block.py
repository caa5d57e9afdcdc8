"""The transformer block of prelude, loop and coda."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn

from open_mythos.checks import checked, pick
from open_mythos.config import MythosConfig
from open_mythos.devices import as_autocast
from open_mythos.model.context import Context
from open_mythos.model.layers.experts import Operands
from open_mythos.model.layers.feed_forward import FEED_FORWARDS
from open_mythos.model.layers.gqa import GQAttention
from open_mythos.model.layers.mla import MLAttention
from open_mythos.model.layers.moe import MoEFFN, Routing, record_routing
from open_mythos.model.layers.norm import RMSNorm
from open_mythos.model.trace import LoopTrace
from open_mythos.ops.random import counter_dropout

ATTENTION: dict[str, type[GQAttention] | type[MLAttention]] = {
    "gqa": GQAttention,
    "mla": MLAttention,
}


Compute = Callable[[Tensor, Context, int | Tensor], tuple[Tensor, Routing | None]]
"""Input of a block -> its output and the routing of its mixture of experts."""


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    That is pre-norm, the default. ``block_norms`` places RMSNorms on the input of each branch, on
    its output before the residual addition, or on the sum after it.

    Args:
        use_moe: Use a mixture of experts as the feed-forward.
        layer: Index of the block in the model, used by caches and traces.
    """

    compiled: Compute | None
    """Called instead of :meth:`compute` if set: its compiled version."""

    @checked
    def __init__(self, cfg: MythosConfig, use_moe: bool = False, layer: int = 0) -> None:
        super().__init__()
        cfg = cfg.at(layer)
        self.cfg, self.layer, self.use_moe = cfg, layer, use_moe
        self.compiled = None
        placed = cfg.block_norms.split("+")
        self.pre_norm = "in" in placed

        def norm(place: str) -> nn.Module:
            if place not in placed:
                return nn.Identity()
            # keep a float32 residual stream in a bfloat16 model
            return RMSNorm(cfg.dim, cfg.norm_eps, keep_dtype=place == "sum")

        self.attn_norm = norm("in")
        attention = pick(ATTENTION, cfg.attn_type, "MythosConfig.attn_type", what="attention")
        self.attn = attention(cfg, layer)
        self.attn_out_norm, self.attn_sum_norm = norm("out"), norm("sum")
        self.ffn_norm = norm("in")
        dense = pick(FEED_FORWARDS, cfg.ffn_kind, "MythosConfig.ffn_kind", what="feed-forward")
        self.ffn = MoEFFN(cfg, layer) if use_moe else dense(cfg.dim, cfg.hidden_dim)
        self.ffn_out_norm, self.ffn_sum_norm = norm("out"), norm("sum")

    def forward(
        self, x_BTD: Tensor, ctx: Context | None = None, loop: int = 0,
        trace: LoopTrace | None = None,
    ) -> Tensor:  # fmt: skip
        """Apply the block, (B, T, D) -> (B, T, D), in the dtype of ``x`` or wider."""
        ctx = ctx or Context.of(x_BTD, self.cfg)
        y_BTD, routing = (self.compiled or self.compute)(x_BTD, ctx, loop)
        if trace is not None and routing is not None:
            record_routing(trace, self.layer, loop, routing, x_BTD, ctx)
        return y_BTD

    def compute(
        self, x_BTD: Tensor, ctx: Context, loop: int | Tensor, operands: Operands | None = None
    ) -> tuple[Tensor, Routing | None]:
        """Return the output (B, T, D) and the routing, without recording it.

        Args:
            x_BTD: Input.
            ctx: Context of the call.
            loop: Loop index; may be a tensor where there is no cache.
            operands: Expert weights, prepared outside of a compiled graph.
        """
        y_BTD = self.attn(as_autocast(self._branch_input(self.attn_norm, x_BTD)), ctx, loop)
        x_BTD = x_BTD + self._drop(self.attn_out_norm(y_BTD), ctx, loop, 0)
        x_BTD = self.attn_sum_norm(x_BTD)
        y_BTD, routing = self._branch_input(self.ffn_norm, x_BTD), None
        if self.use_moe:
            y_BTD, routing = self.ffn(y_BTD, ctx, operands=operands, with_routing=True)
        else:
            y_BTD = self.ffn(y_BTD)
        x_BTD = x_BTD + self._drop(self.ffn_out_norm(y_BTD), ctx, loop, 1)
        return self.ffn_sum_norm(x_BTD), routing

    def _branch_input(self, norm: nn.Module, x_BTD: Tensor) -> Tensor:
        """Normalize the input of a branch, or cast it to the dtype of the weights."""
        if self.pre_norm:
            return norm(x_BTD)
        norms = chain(self.attn_out_norm.parameters(), self.attn_sum_norm.parameters())
        return x_BTD.to(next(norms).dtype)

    def _drop(self, x_BTD: Tensor, ctx: Context, loop: int | Tensor, site: int) -> Tensor:
        if self.cfg.dropout == 0 or not self.training:
            return x_BTD
        keys_B = ctx.keys_B
        if keys_B is None:
            keys_B = torch.randint(1 << 62, (x_BTD.shape[0],), device=x_BTD.device)
        salt = (loop * 4096 + self.layer) * 2 + site
        return counter_dropout(x_BTD, self.cfg.dropout, keys_B, ctx.positions, salt)
