"""Named configurations, from a laptop to a trillion parameters (this module loads no torch).

A name states the total number of parameters; tests pin total and active counts. nano, tiny and
small have the shape with which loops pay on text at the sizes that were measured (docs/claims.md,
claim "text"): the whole stack is in the loop, without experts. Those from 1b on follow the
published table of the architecture's first reconstruction, except 7b.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from open_mythos.checks import checked, pick
from open_mythos.config import MythosConfig

_ATTENTION = (
    "n_heads", "n_kv_heads", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim",
)  # fmt: skip
_EXPERTS = ("n_experts", "expert_dim", "n_shared_experts", "n_experts_per_tok")
_BYTES = {"vocab_size": 320, "tie_embeddings": True}
_LONG = {"max_seq_len": 1_000_000, "max_output_tokens": 131_072}


def _config(
    dim: int,
    attention: tuple[int, ...],
    experts: tuple[int, ...],
    depth: tuple[int, int, int],
    **other: Any,
) -> MythosConfig:
    """Build a configuration from the values of ``_ATTENTION``, ``_EXPERTS`` and ``depth``."""
    loops, outer_layers, lora_rank = depth
    other |= zip(_ATTENTION, attention, strict=True)
    other |= zip(_EXPERTS, experts, strict=True)
    return MythosConfig(
        dim=dim, v_head_dim=attention[-1], max_loop_iters=loops, prelude_layers=outer_layers,
        coda_layers=outer_layers, lora_rank=lora_rank, **other,
    )  # fmt: skip


def _looped_stack(
    dim: int, attention: tuple[int, ...], blocks: int, context: int, **other: Any
) -> MythosConfig:
    """Build a configuration whose blocks are all looped, four times, and have no experts."""
    other |= zip(_ATTENTION, attention, strict=True)
    return MythosConfig(
        dim=dim, v_head_dim=attention[-1], max_loop_iters=4, prelude_layers=0,
        recurrent_layers=blocks, coda_layers=0, n_experts=0, lora_rank=0, ffn_dim=2 * dim,
        max_seq_len=context, max_output_tokens=context, **other,
    )  # fmt: skip


def mythos_nano() -> MythosConfig:
    """0.37 M parameters, byte-level: tests and first experiments."""
    return _looped_stack(128, (4, 2, 32, 64, 16, 32), 2, 512, **_BYTES)


def mythos_tiny() -> MythosConfig:
    """2 M parameters, byte-level: trains in minutes on two cores."""
    return _looped_stack(256, (4, 2, 64, 128, 32, 64), 3, 1024, **_BYTES)


def mythos_small() -> MythosConfig:
    """116 M parameters: trains on one GPU."""
    return _looped_stack(768, (12, 4, 256, 384, 32, 64), 12, 2048)


def mythos_1b() -> MythosConfig:
    """1 B parameters (embedding and head tied; 1.14 B untied), 16 loops, 4k context."""
    attention, experts = (16, 4, 256, 512, 32, 64), (64, 2048, 2, 4)
    return _config(2048, attention, experts, (16, 2, 8), tie_embeddings=True)


def mythos_3b() -> MythosConfig:
    """3 B parameters, 16 loops, 4k context."""
    return _config(3072, (24, 6, 384, 768, 32, 96), (64, 4096, 2, 4), (16, 2, 8))


def mythos_7b() -> MythosConfig:
    """7 B parameters, 24 loops, 8k context: between the published 3b and 10b."""
    attention, experts = (32, 8, 512, 1024, 64, 128), (128, 3840, 2, 4)
    return _config(4096, attention, experts, (24, 2, 16), max_seq_len=8192)


def mythos_10b() -> MythosConfig:
    """10 B parameters, 24 loops, 8k context."""
    attention, experts = (32, 8, 512, 1024, 64, 128), (128, 5632, 2, 4)
    return _config(4096, attention, experts, (24, 2, 16), max_seq_len=8192)


def mythos_50b() -> MythosConfig:
    """50 B parameters, 32 loops, 8k context."""
    attention, experts = (48, 8, 512, 1536, 64, 128), (256, 9728, 4, 4)
    return _config(6144, attention, experts, (32, 3, 32), max_seq_len=8192)


def mythos_100b() -> MythosConfig:
    """100 B parameters, 32 loops, a million tokens of context."""
    attention, experts = (64, 8, 512, 2048, 64, 128), (256, 13568, 4, 8)
    return _config(8192, attention, experts, (32, 4, 64), rope_theta=1e6, **_LONG)


def mythos_500b() -> MythosConfig:
    """500 B parameters, 48 loops, a million tokens of context."""
    attention, experts = (96, 16, 1024, 3072, 64, 128), (512, 23040, 8, 8)
    other = {"vocab_size": 100_000, "rope_theta": 1e6, **_LONG}
    return _config(12288, attention, experts, (48, 4, 128), **other)


def mythos_1t() -> MythosConfig:
    """1 T parameters, 64 loops, a million tokens of context."""
    attention, experts = (128, 16, 1024, 4096, 64, 128), (512, 34560, 8, 8)
    other = {"vocab_size": 100_000, "rope_theta": 2e6, **_LONG}
    return _config(16384, attention, experts, (64, 6, 256), **other)


VARIANTS: dict[str, Callable[[], MythosConfig]] = {
    "nano": mythos_nano, "tiny": mythos_tiny, "small": mythos_small, "1b": mythos_1b,
    "3b": mythos_3b, "7b": mythos_7b, "10b": mythos_10b, "50b": mythos_50b, "100b": mythos_100b,
    "500b": mythos_500b, "1t": mythos_1t,
}  # fmt: skip


@checked
def variant(name: str) -> MythosConfig:
    """Return the configuration called ``name`` ("1b" or "mythos_1b").

    Raises:
        ConfigError: There is no such variant; the message suggests the nearest name.
    """
    return pick(VARIANTS, name.removeprefix("mythos_"), "variant")()
