"""Grouped-query attention."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.model.context import Context
from open_mythos.model.layers.norm import RMSNorm
from open_mythos.ops.attention.attend import attend
from open_mythos.ops.attention.paged import PagedHistory, kv_paged
from open_mythos.ops.rope import apply_rope


class GQAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary embedding.

    The cache entry of a token is its normalized and rotated keys and its values, 2 G K elements.
    """

    def __init__(self, cfg: MythosConfig, layer: int = 0) -> None:
        super().__init__()
        self.cfg, self.layer, self.rotary = cfg, layer, cfg.rotary
        self.scale = cfg.attn_scale or cfg.head_dim**-0.5
        kv_width = cfg.n_kv_heads * cfg.head_dim
        self.q_proj = nn.Linear(cfg.dim, cfg.n_heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.kv_proj = nn.Linear(cfg.dim, 2 * kv_width, bias=cfg.qkv_bias)
        self.out_proj = nn.Linear(cfg.n_heads * cfg.head_dim, cfg.dim, bias=False)
        if cfg.qk_norm != "none":
            eps = cfg.qk_norm_eps or cfg.norm_eps
            heads = (cfg.n_heads, cfg.n_kv_heads) if cfg.qk_norm == "width" else (1, 1)
            self.q_norm, self.k_norm = (
                RMSNorm(n * cfg.head_dim, eps, keep_dtype=True) for n in heads
            )

    def forward(self, x_BTD: Tensor, ctx: Context | None = None, loop: int = 0) -> Tensor:
        """Attend, (B, T, D) -> (B, T, D); without a context, causally over the T tokens."""
        cfg = self.cfg
        ctx = (ctx or Context.of(x_BTD, cfg)).sliding(cfg.window)
        q_BTHK = self.q_proj(x_BTD).unflatten(-1, (cfg.n_heads, cfg.head_dim))
        k_BTGK, v_BTGK = self.kv_proj(x_BTD).unflatten(-1, (2, cfg.n_kv_heads, -1)).unbind(2)
        if cfg.qk_norm == "width":
            q_BTHK = self.q_norm(q_BTHK.flatten(2)).view_as(q_BTHK)
            k_BTGK = self.k_norm(k_BTGK.flatten(2)).view_as(k_BTGK)
        elif cfg.qk_norm == "head":
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        if self.rotary.theta:
            rope = ctx.ropes[self.rotary]
            q_BTHK, k_BTGK = apply_rope(q_BTHK, rope), apply_rope(k_BTGK, rope)
        if cfg.qk_norm == "head_after_rope":
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        k_BSGK, v_BSGK = k_BTGK, v_BTGK
        if ctx.cache is not None:
            entry_BTW = torch.stack((k_BTGK, v_BTGK), dim=2).flatten(2)
            history = ctx.cache.write(self.layer, loop, entry_BTW, ctx.active)
            if isinstance(history, PagedHistory):
                assert x_BTD.shape[1] == 1, "one new token per row"
                history = replace(history, window=cfg.window) if cfg.window else history
                y_BHK = kv_paged(q_BTHK[:, 0], history, cfg.n_kv_heads, scale=self.scale)
                return self.out_proj(y_BHK.flatten(1).unsqueeze(1))
            k_BSGK, v_BSGK = history.unflatten(-1, (2, cfg.n_kv_heads, -1)).unbind(2)
        y_BTHK = attend(
            q_BTHK, k_BSGK, v_BSGK, ctx.mask,
            causal=ctx.causal, scale=self.scale, backend=cfg.attn_backend,
        )  # fmt: skip
        return self.out_proj(y_BTHK.flatten(2))
