"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.checks import checked
from open_mythos.config import MythosConfig
from open_mythos.model.context import Context
from open_mythos.model.layers.norm import RMSNorm
from open_mythos.ops.attention.attend import attend
from open_mythos.ops.attention.latent import latent_attend, latent_values
from open_mythos.ops.attention.paged import PagedHistory, latent_paged
from open_mythos.ops.attention.visibility import Visibility
from open_mythos.ops.rope import apply_rope

SCORES_AT_ONCE = 1 << 24
"""Maximum number of scores that absorbed attention materializes."""
EXPANDED_AT_ONCE = 1 << 26
"""Maximum elements of keys and values that a call without gradient expands at once."""


class MLAttention(nn.Module):
    """Multi-head latent attention: keys and values come from one latent vector per token.

    The cache entry of a token is the normalized latent (R elements) and a rotary key shared by all
    heads. :meth:`forward` picks the cheaper of two equivalent forms:

    - *expanded*: up-project the latents to keys and values of every head; for many new tokens.
    - *absorbed*: fold the up-projections into query and output, so that the history stays latent;
      for few new tokens on a long history, as in decoding, and for a history in pages.
    """

    @checked
    def __init__(self, cfg: MythosConfig, layer: int = 0) -> None:
        super().__init__()
        self.cfg, self.layer, self.rotary = cfg, layer, cfg.rotary
        heads, key_width = cfg.n_heads, cfg.qk_nope_head_dim + cfg.qk_rope_head_dim
        if cfg.q_lora_rank:
            self.q_down = nn.Linear(cfg.dim, cfg.q_lora_rank, bias=False)
            self.q_norm = RMSNorm(cfg.q_lora_rank, cfg.norm_eps)
        self.q_up = nn.Linear(cfg.q_lora_rank or cfg.dim, heads * key_width, bias=False)
        self.kv_down = nn.Linear(cfg.dim, cfg.kv_lora_rank + cfg.qk_rope_head_dim, bias=False)
        self.kv_norm = RMSNorm(cfg.kv_lora_rank, cfg.norm_eps)
        up_width = heads * (cfg.qk_nope_head_dim + cfg.v_head_dim)
        self.kv_up = nn.Linear(cfg.kv_lora_rank, up_width, bias=False)
        self.out_proj = nn.Linear(heads * cfg.v_head_dim, cfg.dim, bias=False)
        self.scale = key_width**-0.5

    def forward(self, x_BTD: Tensor, ctx: Context | None = None, loop: int = 0) -> Tensor:
        """Attend, (B, T, D) -> (B, T, D); without a context, causally over the T tokens."""
        cfg = self.cfg
        ctx = (ctx or Context.of(x_BTD, cfg)).sliding(cfg.window)
        rope = ctx.ropes[self.rotary] if self.rotary.theta else None
        q_BTHK = self.query(x_BTD, rope)
        entry_BSW = self.entry(x_BTD, rope)
        if ctx.cache is not None:
            history = ctx.cache.write(self.layer, loop, entry_BSW, ctx.active)
            if isinstance(history, PagedHistory):
                history = replace(history, window=cfg.window) if cfg.window else history
                return self.out_proj(self.paged(q_BTHK, history, ctx).flatten(2))
            assert isinstance(history, Tensor), "latents: one tensor, or pages"
            entry_BSW = history
        absorb = self.absorbing_is_cheaper(x_BTD.shape[1], entry_BSW.shape[1])
        if absorb and torch.is_grad_enabled():
            # autograd would save the scores of all pairs
            absorb = _scores(q_BTHK, entry_BSW) <= SCORES_AT_ONCE
        attend_latent = self._absorbed_in_blocks if absorb else self.expanded
        return self.out_proj(attend_latent(q_BTHK, entry_BSW, ctx).flatten(2))

    def query(self, x_BTD: Tensor, rope: Tensor | None) -> Tensor:
        """Return (B, T, H, nope + rope) queries, the last part rotated if there is a table."""
        low = self.q_norm(self.q_down(x_BTD)) if self.cfg.q_lora_rank else x_BTD
        q_BTHK = self.q_up(low).unflatten(-1, (self.cfg.n_heads, -1))
        if rope is None:
            return q_BTHK
        nope, rotary = q_BTHK.split([self.cfg.qk_nope_head_dim, self.cfg.qk_rope_head_dim], dim=-1)
        return torch.cat((nope, apply_rope(rotary, rope)), dim=-1)

    def entry(self, x_BTD: Tensor, rope: Tensor | None) -> Tensor:
        """Return the (B, T, R + rope) cache entries."""
        latent, key = self.kv_down(x_BTD).split(
            [self.cfg.kv_lora_rank, self.cfg.qk_rope_head_dim], dim=-1
        )
        if rope is not None:
            key = apply_rope(key.unsqueeze(2), rope).squeeze(2)
        return torch.cat((self.kv_norm(latent).to(key.dtype), key), dim=-1)

    def expanded(self, q_BTHK: Tensor, entry_BSW: Tensor, ctx: Context) -> Tensor:
        """Attend over up-projected keys and values, (B, T, H, V).

        Without gradient, a long history is expanded for a few heads at a time.
        """
        cfg = self.cfg
        heads = cfg.n_heads
        widths = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim
        if not torch.is_grad_enabled():
            positions = entry_BSW.shape[0] * entry_BSW.shape[1]
            heads = min(heads, max(1, EXPANDED_AT_ONCE // max(1, positions * widths)))
        latent, key = entry_BSW.split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], dim=-1)
        if heads == cfg.n_heads:
            return self._attend_expanded(q_BTHK, self.kv_up(latent), key, ctx)
        up_HUR = self._up_weight(ctx).unflatten(0, (cfg.n_heads, -1))
        return torch.cat([
            self._attend_expanded(q, F.linear(latent, up.flatten(0, 1)), key, ctx)
            for q, up in zip(q_BTHK.split(heads, dim=2), up_HUR.split(heads), strict=True)
        ], dim=2)  # fmt: skip

    def _attend_expanded(self, q_BTHK: Tensor, up_BSU: Tensor, key: Tensor, ctx: Context) -> Tensor:
        """Attend with ``up_BSU``, the position-free keys and the values of the queries' heads."""
        cfg, heads = self.cfg, q_BTHK.shape[2]
        nope, v_BSHV = up_BSU.unflatten(-1, (heads, -1)).split(
            [cfg.qk_nope_head_dim, cfg.v_head_dim], dim=-1
        )
        shared = key.unsqueeze(2).expand(-1, -1, heads, -1)
        k_BSHK = torch.cat((nope, shared.to(nope.dtype)), dim=-1)
        return attend(
            q_BTHK, k_BSHK, v_BSHV, ctx.mask,
            causal=ctx.causal, scale=self.scale, backend=cfg.attn_backend,
        )  # fmt: skip

    def _absorbed_in_blocks(self, q_BTHK: Tensor, entry_BSW: Tensor, ctx: Context) -> Tensor:
        """Call :meth:`absorbed` on blocks of queries with at most SCORES_AT_ONCE scores."""
        n_new = q_BTHK.shape[1]
        size = max(1, n_new * SCORES_AT_ONCE // max(1, _scores(q_BTHK, entry_BSW)))
        if size >= n_new:
            seen = ctx.window(0, n_new) if isinstance(ctx.mask, Visibility) else ctx
            return self.absorbed(q_BTHK, entry_BSW, seen)
        spans = [(start, min(start + size, n_new)) for start in range(0, n_new, size)]
        return torch.cat([
            self.absorbed(q_BTHK[:, start:stop], entry_BSW, ctx.window(start, stop))
            for start, stop in spans
        ], dim=1)  # fmt: skip

    def absorbed(self, q_BTHK: Tensor, entry_BSW: Tensor, ctx: Context) -> Tensor:
        """Attend in the latent space, (B, T, H, V)."""
        assert not isinstance(ctx.mask, Visibility), "a window of the call has its mask"
        q_BTHW, value_up_HVR = self._latent_query(q_BTHK, ctx)
        mixed_BTHR = latent_attend(
            q_BTHW, entry_BSW.to(q_BTHW.dtype), ctx.mask,
            rank=self.cfg.kv_lora_rank, causal=ctx.causal,
        )  # fmt: skip
        return latent_values(mixed_BTHR, value_up_HVR)

    def paged(self, q_B1HK: Tensor, history: PagedHistory, ctx: Context) -> Tensor:
        """Attend with one new token per row to latents in pages, (B, 1, H, V)."""
        assert q_B1HK.shape[1] == 1, "one new token per row"
        q_B1HW, value_up_HVR = self._latent_query(q_B1HK, ctx)
        mixed_BHR = latent_paged(q_B1HW[:, 0], history, self.cfg.kv_lora_rank)
        return latent_values(mixed_BHR.unsqueeze(1), value_up_HVR)

    def _latent_query(self, q_BTHK: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Return scaled queries (B, T, H, W) of the latent space, and the way back (H, V, R)."""
        cfg = self.cfg
        up_HUR = self._up_weight(ctx).unflatten(0, (cfg.n_heads, -1))
        key_up_HNR, value_up_HVR = up_HUR.split([cfg.qk_nope_head_dim, cfg.v_head_dim], dim=1)
        # scaling queries is cheaper than scaling scores
        nope, rotary = (q_BTHK * self.scale).split(
            [cfg.qk_nope_head_dim, cfg.qk_rope_head_dim], dim=-1
        )
        latent_query = torch.einsum("bthn,hnr->bthr", nope, key_up_HNR)
        return torch.cat((latent_query, rotary.to(latent_query.dtype)), dim=-1), value_up_HVR

    def _up_weight(self, ctx: Context) -> Tensor:
        """Return the (U, R) matrix of ``kv_up``, wrappers such as adapters included."""
        if type(self.kv_up) is nn.Linear and _is_plain(self.kv_up.weight):
            return self.kv_up.weight
        key = self, torch.is_grad_enabled(), torch.is_autocast_enabled(ctx.positions.device.type)
        if key not in ctx.memo:
            like = next(self.kv_up.parameters())
            identity = torch.eye(self.cfg.kv_lora_rank, dtype=like.dtype, device=like.device)
            ctx.memo[key] = self.kv_up(identity).mT
        return cast(Tensor, ctx.memo[key])

    def absorbing_is_cheaper(self, n_new: int, n_all: int) -> bool:
        """Return whether ``n_new`` queries over ``n_all`` positions cost less absorbed."""
        cfg = self.cfg
        up = cfg.kv_lora_rank * (cfg.qk_nope_head_dim + cfg.v_head_dim)
        key_width = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim
        expanded = n_all * up + n_new * n_all * (key_width + cfg.v_head_dim)
        absorbed = n_new * up + n_new * n_all * 2 * cfg.cache_width
        return absorbed < expanded


def _is_plain(weight: Tensor) -> bool:
    """Return whether a weight is numbers, not a subclass that packs them, as torchao's are."""
    return not hasattr(weight, "tensor_impl") and not hasattr(weight, "qdata")


def _scores(q_BTHK: Tensor, entry_BSW: Tensor) -> int:
    return q_BTHK.shape[:3].numel() * entry_BSW.shape[1]
