"""The model that is timed, in its sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from open_mythos.config import MythosConfig
from open_mythos.model import OpenMythos


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    dim: int
    n_loops: int
    batch: int
    tokens: int
    decode_batch: int
    contexts: tuple[int, ...]
    experts: tuple[tuple[int, int], ...]
    """(routed experts, chosen per token)."""
    alternations: int


FULL = Scale(512, 8, 4, 512, 8, (512, 2048), ((16, 2), (64, 4)), 3)
QUICK = Scale(64, 2, 1, 24, 2, (40,), ((4, 2),), 1)


def build(scale: Scale, attn_type: str, experts: tuple[int, int]) -> OpenMythos:
    """A model with noise on every weight: fresh ones have branches of zero, which hide errors."""
    torch.manual_seed(0)
    model = OpenMythos(config(scale, attn_type, experts))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def config(scale: Scale, attn_type: str, experts: tuple[int, int]) -> MythosConfig:
    """8 heads of dim / 8; latents and experts half as wide as dim."""
    dim = scale.dim
    return MythosConfig(
        vocab_size=1024, dim=dim, n_heads=8, n_kv_heads=2, max_seq_len=4096,
        max_loop_iters=scale.n_loops, prelude_layers=1, coda_layers=1, attn_type=attn_type,
        kv_lora_rank=dim // 2, q_lora_rank=dim // 2, qk_rope_head_dim=dim // 16,
        qk_nope_head_dim=dim // 8, v_head_dim=dim // 8, n_experts=experts[0], n_shared_experts=1,
        n_experts_per_tok=max(1, experts[1]), expert_dim=dim // 2, lora_rank=8,
    )  # fmt: skip
