"""Attention and the dense feed-forward in ghost tensors: ``model/layers``, line by line.

Each class mirrors the one that it names, so that intermediate results die where they die there.
"""

from __future__ import annotations

from collections.abc import Mapping

from open_mythos.config import MythosConfig
from open_mythos.errors import ConfigError
from open_mythos.plan.ops import Ops
from open_mythos.plan.tape import BOOL, FLOAT32, INT64, Ghost, Weight

SCORES_AT_ONCE = 1 << 24
"""Of ``open_mythos.model.layers.mla``, which loads torch; a test compares."""
Weights = Mapping[str, Weight]
"""Name in the state dict -> parameter."""


class Attention:
    """``GQAttention`` or ``MLAttention``.

    Args:
        cfg: The model.
        weights: Of the whole model.
        name: What the names of this layer's begin with.

    Raises:
        ConfigError: The backend is the plain twin, which nobody would train with.
    """

    def __init__(self, cfg: MythosConfig, weights: Weights, name: str) -> None:
        if cfg.attn_backend == "reference":
            raise ConfigError(
                "the plain twin of attention is not planned for", where="attn_backend",
                value=cfg.attn_backend, allowed='"auto", "sdpa", "flash" or "flex"',
                fix='set attn_backend to "auto"',
            )  # fmt: skip
        self.cfg = cfg
        self._weights, self._name = weights, name

    def __call__(self, ops: Ops, x: Ghost, tokens: int) -> Ghost:
        """``forward`` of sequences of ``tokens``."""
        if self.cfg.attn_type == "gqa":
            return self._gqa(ops, x)
        q = self._query(ops, x)
        entry = self._entry(ops, x)
        if self._absorbs(q, tokens):
            return ops.linear(self._absorbed(ops, q, entry, tokens), self._of("out_proj"))
        return ops.linear(self._expanded(ops, q, entry), self._of("out_proj"))

    def _of(self, name: str) -> Weight:
        return self._weights[f"{self._name}.{name}.weight"]

    def _gqa(self, ops: Ops, x: Ghost) -> Ghost:
        q = ops.linear(x, self._of("q_proj"))
        k, v = _halves(ops, ops.linear(x, self._of("kv_proj")))
        q, k = ops.rope(q), ops.rope(k)
        y = ops.attention(q, k, v, q.n // self.cfg.head_dim)
        return ops.linear(y, self._of("out_proj"))

    def _query(self, ops: Ops, x: Ghost) -> Ghost:
        cfg, low = self.cfg, x
        if cfg.q_lora_rank:
            low = ops.rms_norm(ops.linear(x, self._of("q_down")), self._of("q_norm"))
        q = ops.linear(low, self._of("q_up"))
        nope, rotary = _parts(ops, q, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim)
        return ops.cat(nope, ops.rope(rotary))

    def _entry(self, ops: Ops, x: Ghost) -> Ghost:
        cfg = self.cfg
        latent, key = _parts(
            ops, ops.linear(x, self._of("kv_down")), cfg.kv_lora_rank, cfg.qk_rope_head_dim
        )
        key = ops.rope(key)
        return ops.cat(ops.to(ops.rms_norm(latent, self._of("kv_norm")), key.size), key)

    def _expanded(self, ops: Ops, q: Ghost, entry: Ghost) -> Ghost:
        cfg, key_width = self.cfg, self.cfg.qk_nope_head_dim + self.cfg.qk_rope_head_dim
        latent, key = _parts(ops, entry, cfg.kv_lora_rank, cfg.qk_rope_head_dim)
        nope, v = _parts(
            ops, ops.linear(latent, self._of("kv_up")), cfg.qk_nope_head_dim, cfg.v_head_dim
        )
        shared = ops.spread(key, key.n * cfg.n_heads)
        k = ops.cat(nope, ops.to(shared, nope.size))
        rows = q.n // key_width
        if cfg.v_head_dim > key_width:
            q, k = (ops.pad(x, rows * cfg.v_head_dim) for x in (q, k))
        if cfg.v_head_dim >= key_width:
            return ops.attention(q, k, v, rows)
        y = ops.attention(q, k, ops.pad(v, rows * key_width), rows)
        # the slice is not contiguous, so joining the heads copies it
        return ops.copy(ops.part(y, rows * cfg.v_head_dim))

    def _absorbs(self, q: Ghost, tokens: int) -> bool:
        """``absorbing_is_cheaper`` for as many queries as positions, if their scores are few."""
        cfg = self.cfg
        key_width = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim
        few = q.n // key_width * tokens <= SCORES_AT_ONCE
        return few and 2 * cfg.cache_width < key_width + cfg.v_head_dim

    def _absorbed(self, ops: Ops, q: Ghost, entry: Ghost, tokens: int) -> Ghost:
        """Attention in the latent space, which writes the scores of all pairs out."""
        cfg = self.cfg
        rows = q.n // (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)
        up = ops.low(self._of("kv_up"))
        nope, rotary = _parts(ops, ops.scaled(q), cfg.qk_nope_head_dim, cfg.qk_rope_head_dim)
        latent_query = ops.contraction(nope, up, rows * cfg.kv_lora_rank)
        query = ops.cat(latent_query, ops.to(rotary, latent_query.size))
        scores = ops.contraction(entry, query, rows * tokens)
        scores = ops.to(ops.copy(scores), FLOAT32)
        mask = ops.new(tokens * tokens, BOOL)
        scores = ops.mul(scores, mask)
        weights = ops.to(ops.unary(scores, saves_result=True), entry.size)
        mixed = ops.part(ops.contraction(weights, entry, query.n), latent_query.n)
        return ops.contraction(mixed, up, rows * cfg.v_head_dim)


class FeedForward:
    """``Expert``: gate and up in one product, then down.

    Args:
        weights: Of the whole model.
        name: What the names of this layer's begin with.
    """

    def __init__(self, weights: Weights, name: str) -> None:
        self._gate_up = weights[f"{name}.gate_up.weight"]
        self._down = weights[f"{name}.down.weight"]

    def __call__(self, ops: Ops, x: Ghost) -> Ghost:
        """``forward``."""
        gate, up = _halves(ops, ops.linear(x, self._gate_up))
        return ops.linear(ops.mul(ops.unary(gate), up), self._down)


def dropped(ops: Ops, x: Ghost, p: float) -> Ghost:
    """``counter_dropout``: integers of 64 bits are hashed into a mask, three arrays at a time."""
    if not p:
        return x
    bits = [ops.new(x.n, INT64) for _ in range(3)]
    del bits
    keep, zeros, scaled = ops.new(x.n, BOOL), ops.new(x.n, x.size), ops.scaled(x)
    y, n, size = ops.new(x.n, x.size), x.n, x.size
    ops.record((y,), (scaled,), lambda g, s: (ops.new(n, size),), (keep,))
    del zeros
    return y


def _halves(ops: Ops, x: Ghost) -> list[Ghost]:
    return ops.split(x, x.n // 2, x.n // 2)


def _parts(ops: Ops, x: Ghost, first: int, second: int) -> list[Ghost]:
    """``x`` cut along its last axis into two parts so wide."""
    rows = x.n // (first + second)
    return ops.split(x, rows * first, rows * second)
