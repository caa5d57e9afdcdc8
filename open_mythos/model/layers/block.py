"""The pre-norm transformer block that prelude, loop and coda are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.devices import as_autocast
from open_mythos.errors import ConfigError
from open_mythos.model.context import Context
from open_mythos.model.layers.feed_forward import Expert
from open_mythos.model.layers.gqa import GQAttention
from open_mythos.model.layers.mla import MLAttention
from open_mythos.model.layers.moe import MoEFFN, Routing, Stacks
from open_mythos.model.layers.norm import RMSNorm
from open_mythos.model.trace import LoopTrace
from open_mythos.ops.random import counter_dropout

ATTENTION: dict[str, type[GQAttention] | type[MLAttention]] = {
    "gqa": GQAttention,
    "mla": MLAttention,
}


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    Args:
        cfg: The model's configuration.
        use_moe: Mixture of experts instead of a dense feed-forward.
        layer: Number of the block in the model; names its cache slots and its routing records.
    """

    def __init__(self, cfg: MythosConfig, use_moe: bool = False, layer: int = 0) -> None:
        super().__init__()
        if cfg.attn_type not in ATTENTION:
            raise ConfigError(
                "unknown attention", where="MythosConfig.attn_type", value=cfg.attn_type,
                allowed=", ".join(ATTENTION), fix="correct attn_type in the configuration",
            )  # fmt: skip
        self.layer, self.dropout = layer, cfg.dropout
        self.attn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.attn = ATTENTION[cfg.attn_type](cfg, layer)
        self.ffn_norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.ffn = MoEFFN(cfg, layer) if use_moe else Expert(cfg.dim, cfg.hidden_dim)
        self.context_of = (cfg.rope_dim, cfg.rope_theta)

    def forward(
        self,
        x_BTD: Tensor,
        ctx: Context | None = None,
        loop: int = 0,
        trace: LoopTrace | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D), in the dtype of ``x`` or wider."""
        if ctx is None:
            ctx = Context.build(x_BTD.shape[1], *self.context_of, x_BTD.device)
        moe = self.ffn if isinstance(self.ffn, MoEFFN) else None
        stacks = None if moe is None else moe.stacks(x_BTD, ctx)
        y_BTD, routing = self.compute(x_BTD, ctx, loop, stacks)
        if trace is not None and moe is not None and routing is not None:
            moe.record(routing, x_BTD, ctx, loop, trace)
        return y_BTD

    def compute(
        self, x_BTD: Tensor, ctx: Context, loop: int | Tensor, stacks: Stacks | None
    ) -> tuple[Tensor, Routing | None]:
        """The block itself, and what its router decided: what ``train.compile`` compiles.

        Args:
            x_BTD: Input.
            ctx: Of the call.
            loop: Index t; dropout takes a tensor too, and nothing else reads it without a cache.
            stacks: Weights of the mixture of experts, if there is one.
        """
        attended = self.attn(as_autocast(self.attn_norm(x_BTD)), ctx, loop)
        x_BTD = x_BTD + self._drop(attended, ctx, loop, 0)
        y_BTD, routing = self.ffn_norm(x_BTD), None
        if isinstance(self.ffn, MoEFFN):
            y_BTD, routing = self.ffn.compute(y_BTD, stacks)
        else:
            y_BTD = self.ffn(y_BTD)
        return x_BTD + self._drop(y_BTD, ctx, loop, 1), routing

    def _drop(self, x_BTD: Tensor, ctx: Context, loop: int | Tensor, site: int) -> Tensor:
        if self.dropout == 0 or not self.training:
            return x_BTD
        keys_B = ctx.keys_B
        if keys_B is None:
            keys_B = torch.randint(1 << 62, (x_BTD.shape[0],), device=x_BTD.device)
        salt = (loop * 4096 + self.layer) * 2 + site
        return counter_dropout(x_BTD, self.dropout, keys_B, ctx.positions, salt)
