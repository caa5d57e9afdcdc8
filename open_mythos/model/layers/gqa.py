"""Grouped-query attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from open_mythos.checks import checked
from open_mythos.config import VALUE_GATE_CHANNELS, MythosConfig
from open_mythos.errors import ConfigError
from open_mythos.model.context import Context
from open_mythos.model.layers.norm import RMSNorm
from open_mythos.ops.attention.attend import attend
from open_mythos.ops.rope import apply_rope


class GQAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary embedding.

    The cache entry of a token is its normalized and rotated keys and its values, 2 G K elements.
    With ``value_embedding``, a layer adds 2 sigmoid(gate x) times an embedding of the token to each
    value head, with x the first channels of its input (Parcae, arXiv 2604.12946).
    """

    @checked
    def __init__(self, cfg: MythosConfig, layer: int = 0) -> None:
        super().__init__()
        self.cfg, self.layer, self.rotary = cfg, layer, cfg.rotary
        self.scale = cfg.attn_scale or cfg.head_dim**-0.5
        kv_width = cfg.n_kv_heads * cfg.head_dim
        self.q_proj = nn.Linear(cfg.dim, cfg.n_heads * cfg.head_dim, bias=cfg.qkv_bias)
        self.kv_proj = nn.Linear(cfg.dim, 2 * kv_width, bias=cfg.qkv_bias)
        self.out_proj = nn.Linear(cfg.n_heads * cfg.head_dim, cfg.dim, bias=False)
        self.value_gate = None
        if cfg.value_embedding:
            self.value_gate = nn.Linear(VALUE_GATE_CHANNELS, cfg.n_kv_heads, bias=False)
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
        if self.value_gate is not None:
            v_BTGK = v_BTGK + self._token_values(x_BTD, ctx, self.value_gate)
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
            if not isinstance(history, Tensor):
                y_BTHK = history.attend(q_BTHK, cfg.n_kv_heads, self.scale, cfg.window)
                return self.out_proj(y_BTHK.flatten(2))
            k_BSGK, v_BSGK = history.unflatten(-1, (2, cfg.n_kv_heads, -1)).unbind(2)
        y_BTHK = attend(
            q_BTHK, k_BSGK, v_BSGK, ctx.mask,
            causal=ctx.causal, scale=self.scale, backend=cfg.attn_backend,
        )  # fmt: skip
        return self.out_proj(y_BTHK.flatten(2))

    def _token_values(self, x_BTD: Tensor, ctx: Context, gate: nn.Module) -> Tensor:
        """Return the gated embeddings of the tokens (B, T, G, K)."""
        if self.layer not in ctx.values:
            raise ConfigError(
                "value embeddings need the tokens", where="ctx", value="a context of states alone",
                allowed="the context that embed() got with the tokens",
                fix="pass ctx to embed() and to this call",
            )  # fmt: skip
        gate_BTG1 = 2 * gate(x_BTD[..., :VALUE_GATE_CHANNELS]).sigmoid().unsqueeze(-1)
        return gate_BTG1 * ctx.values[self.layer].unflatten(-1, (self.cfg.n_kv_heads, -1))
