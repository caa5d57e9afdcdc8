"""Named configurations, from a laptop to a trillion parameters (this module loads no torch).

A name states the total number of parameters; tests pin total and active counts. Those from 1b on
follow the published table of the architecture's first reconstruction, except 7b.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from open_mythos.checks import pick
from open_mythos.config import MythosConfig


def _mla(heads: int, kv: int, latent: int, query: int, rope: int, nope: int) -> dict[str, Any]:
    """Return the attention fields; nope and value heads are equally wide."""
    return {
        "n_heads": heads, "n_kv_heads": kv, "kv_lora_rank": latent, "q_lora_rank": query,
        "qk_rope_head_dim": rope, "qk_nope_head_dim": nope, "v_head_dim": nope,
    }  # fmt: skip


def _moe(experts: int, width: int, shared: int, top_k: int) -> dict[str, Any]:
    """Return the expert fields."""
    return {
        "n_experts": experts, "expert_dim": width, "n_shared_experts": shared,
        "n_experts_per_tok": top_k,
    }  # fmt: skip


def _depth(loops: int, outer_layers: int, lora_rank: int) -> dict[str, Any]:
    """Return the depth fields; prelude and coda are equally deep."""
    return {
        "max_loop_iters": loops, "prelude_layers": outer_layers, "coda_layers": outer_layers,
        "lora_rank": lora_rank,
    }  # fmt: skip


def _long(theta: float) -> dict[str, Any]:
    return {"max_seq_len": 1_000_000, "max_output_tokens": 131_072, "rope_theta": theta}


def mythos_nano() -> MythosConfig:
    """0.7 M parameters, byte-level: tests and first experiments."""
    return MythosConfig(
        vocab_size=320, dim=128, max_seq_len=512, max_output_tokens=512,
        **_mla(4, 2, 32, 64, 16, 32), **_moe(8, 64, 1, 2), **_depth(4, 1, 4),
    )  # fmt: skip


def mythos_tiny() -> MythosConfig:
    """3.2 M parameters, byte-level: trains in minutes on two cores."""
    return MythosConfig(
        vocab_size=320, dim=256, max_seq_len=1024, max_output_tokens=1024,
        **_mla(4, 2, 64, 128, 32, 64), **_moe(16, 128, 1, 2), **_depth(6, 1, 8),
    )  # fmt: skip


def mythos_small() -> MythosConfig:
    """112 M parameters: trains on one GPU."""
    return MythosConfig(
        vocab_size=32000, dim=768, max_seq_len=2048, max_output_tokens=2048,
        **_mla(12, 4, 256, 384, 32, 64), **_moe(32, 512, 1, 4), **_depth(8, 2, 8),
    )  # fmt: skip


def mythos_1b() -> MythosConfig:
    """1 B parameters (embedding and head tied; 1.14 B untied), 16 loops, 4k context."""
    return MythosConfig(
        dim=2048, tie_embeddings=True, **_mla(16, 4, 256, 512, 32, 64), **_moe(64, 2048, 2, 4),
        **_depth(16, 2, 8),
    )  # fmt: skip


def mythos_3b() -> MythosConfig:
    """3 B parameters, 16 loops, 4k context."""
    return MythosConfig(
        dim=3072, **_mla(24, 6, 384, 768, 32, 96), **_moe(64, 4096, 2, 4), **_depth(16, 2, 8)
    )


def mythos_7b() -> MythosConfig:
    """7 B parameters, 24 loops, 8k context: between the published 3b and 10b."""
    return MythosConfig(
        dim=4096, max_seq_len=8192, **_mla(32, 8, 512, 1024, 64, 128), **_moe(128, 3840, 2, 4),
        **_depth(24, 2, 16),
    )  # fmt: skip


def mythos_10b() -> MythosConfig:
    """10 B parameters, 24 loops, 8k context."""
    return MythosConfig(
        dim=4096, max_seq_len=8192, **_mla(32, 8, 512, 1024, 64, 128), **_moe(128, 5632, 2, 4),
        **_depth(24, 2, 16),
    )  # fmt: skip


def mythos_50b() -> MythosConfig:
    """50 B parameters, 32 loops, 8k context."""
    return MythosConfig(
        dim=6144, max_seq_len=8192, **_mla(48, 8, 512, 1536, 64, 128), **_moe(256, 9728, 4, 4),
        **_depth(32, 3, 32),
    )  # fmt: skip


def mythos_100b() -> MythosConfig:
    """100 B parameters, 32 loops, a million tokens of context."""
    return MythosConfig(
        dim=8192, **_long(1e6), **_mla(64, 8, 512, 2048, 64, 128), **_moe(256, 13568, 4, 8),
        **_depth(32, 4, 64),
    )  # fmt: skip


def mythos_500b() -> MythosConfig:
    """500 B parameters, 48 loops, a million tokens of context."""
    return MythosConfig(
        vocab_size=100_000, dim=12288, **_long(1e6), **_mla(96, 16, 1024, 3072, 64, 128),
        **_moe(512, 23040, 8, 8), **_depth(48, 4, 128),
    )  # fmt: skip


def mythos_1t() -> MythosConfig:
    """1 T parameters, 64 loops, a million tokens of context."""
    return MythosConfig(
        vocab_size=100_000, dim=16384, **_long(2e6), **_mla(128, 16, 1024, 4096, 64, 128),
        **_moe(512, 34560, 8, 8), **_depth(64, 6, 256),
    )  # fmt: skip


VARIANTS: dict[str, Callable[[], MythosConfig]] = {
    "nano": mythos_nano, "tiny": mythos_tiny, "small": mythos_small, "1b": mythos_1b,
    "3b": mythos_3b, "7b": mythos_7b, "10b": mythos_10b, "50b": mythos_50b, "100b": mythos_100b,
    "500b": mythos_500b, "1t": mythos_1t,
}  # fmt: skip


def variant(name: str) -> MythosConfig:
    """Return the configuration called ``name`` ("1b" or "mythos_1b").

    Raises:
        ConfigError: There is no such variant; the message suggests the nearest name.
    """
    return pick(VARIANTS, name.removeprefix("mythos_"), "variant")()
