"""Models under test and their sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.clock import device
from open_mythos.config import MythosConfig
from open_mythos.model.dense import DenseTransformer
from open_mythos.model.mythos import OpenMythos
from open_mythos.variants import variant

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Scale:
    """Sizes of a run."""

    dim: int
    n_loops: int
    batch: int
    tokens: int
    decode_batch: int
    contexts: tuple[int, ...]
    experts: tuple[tuple[int, int], ...]
    """(routed experts, chosen per token)."""
    alternations: int
    layers: tuple[tuple[int, int], ...] = ()
    """(routed experts, chosen per token) of a layer alone."""
    layer_tokens: int = 2048
    loops: tuple[int, ...] = ()
    loops_dim: int = 128
    prompts: tuple[int, ...] = ()
    """Lengths of prompts."""
    chunk: int = 512
    histories: tuple[int, ...] = ()
    """Positions in the cache for timing a step against context."""
    batches: tuple[int, ...] = ()
    large: str = "nano"
    """Variant for pretraining and serving."""
    large_tokens: int = 64
    large_batch: int = 2
    served: tuple[int, ...] = ()
    """Batches that the large model decodes."""
    turns: int = 5
    """Rounds where one call is short."""


FULL = Scale(
    512, 8, 4, 512, 8, (512, 4096), ((16, 2), (64, 4), (256, 8)), 3,
    layers=((8, 2), (16, 2), (64, 4), (256, 8), (512, 8)), layer_tokens=2048,
    loops=(1, 2, 4, 8, 16, 32, 64), loops_dim=128, prompts=(512, 2048, 8192), chunk=512,
    histories=(512, 2048, 8192, 32768), batches=(1, 2, 4, 8, 16, 32), served=(1, 4), turns=7,
)  # fmt: skip
QUICK = Scale(
    64, 2, 1, 24, 2, (40,), ((4, 2),), 1, layers=((4, 2),), layer_tokens=24, loops=(1, 2, 4),
    loops_dim=32, prompts=(24,), chunk=8, histories=(24, 48), batches=(1, 2), served=(1, 2),
    large_tokens=16, turns=1,
)  # fmt: skip
GPU = Scale(
    1024, 8, 16, 1024, 32, (2048, 8192), ((16, 2), (64, 4), (256, 8)), 5,
    layers=((8, 2), (16, 2), (64, 4), (256, 8), (512, 8)), layer_tokens=16384,
    loops=(1, 2, 4, 8, 16, 32, 64), loops_dim=512, prompts=(512, 2048, 8192), chunk=512,
    histories=(512, 2048, 8192, 32768), batches=(1, 4, 16, 64, 256), large="1b",
    large_tokens=2048, large_batch=8, served=(1, 64, 256), turns=7,
)  # fmt: skip
"""For a GPU of 80 GB or more."""


def build(scale: Scale, attn_type: str, experts: tuple[int, int]) -> OpenMythos:
    """Build a model with noise on every weight: zero-initialized branches would hide errors."""
    return noisy(lambda: OpenMythos(config(scale, attn_type, experts)))


def dense_like(cfg: MythosConfig, n_loops: int) -> DenseTransformer:
    """Build a dense model of the unrolled depth, each block as wide as one token's share.

    It takes as many FLOPs, and stores a block for every loop.
    """
    return noisy(lambda: DenseTransformer.like(cfg, match="depth", n_loops=n_loops))


def noisy(make: Callable[[], Module]) -> Module:
    """Build a module on the device under test, with deterministic noise on every weight."""
    torch.manual_seed(0)
    with device():
        model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def sharing(model: Module) -> Module:
    """Copy the modules of ``model``, sharing its parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def config(scale: Scale, attn_type: str, experts: tuple[int, int]) -> MythosConfig:
    """Return a configuration with 8 heads of dim / 8; latents and experts of dim / 2."""
    dim = scale.dim
    return MythosConfig(
        vocab_size=1024, dim=dim, n_heads=8, n_kv_heads=2, max_seq_len=1 << 16,
        max_loop_iters=scale.n_loops, prelude_layers=1, coda_layers=1, attn_type=attn_type,
        kv_lora_rank=dim // 2, q_lora_rank=dim // 2, qk_rope_head_dim=dim // 16,
        qk_nope_head_dim=dim // 8, v_head_dim=dim // 8, n_experts=experts[0], n_shared_experts=1,
        n_experts_per_tok=max(1, experts[1]), expert_dim=dim // 2, lora_rank=8,
    )  # fmt: skip


def looped_dense(scale: Scale) -> MythosConfig:
    """Return the large model's configuration with dense blocks: 370 M parameters at 1536."""
    if scale.large == "1b":
        return MythosConfig(
            vocab_size=32_000, dim=1536, n_heads=12, n_kv_heads=12, attn_type="gqa",
            max_seq_len=4096, max_loop_iters=8, prelude_layers=4, recurrent_layers=4,
            coda_layers=3, n_experts=0, lora_rank=0, tie_embeddings=True, ffn_dim=4096,
        )  # fmt: skip
    return replace(variant(scale.large), n_experts=0, attn_type="gqa", lora_rank=0)


def random_ids(batch: int, tokens: int, vocabulary: int = 1024, seed: int = 1) -> Tensor:
    """Return (batch, tokens) ids, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (batch, tokens), generator=generator).to(device())


def new_each_time(make: Callable[[int], Tensor]) -> Callable[[], Tensor]:
    """Return a function that returns ``make(1)``, ``make(2)``, ... in turn.

    No step of a training sees the batch of the one before, and no router its choices: a form that
    is fast only where all sizes stay must not look fast.
    """
    seeds = count(1)
    return lambda: make(next(seeds))
