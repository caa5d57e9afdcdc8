"""Counter-based random numbers: a function of integers, not of call order.

Every element is a hash of (key of its sequence, position, channel, salt). Dropout masks and initial
states are therefore the same whether a sequence runs alone or in a batch, on one rank or on eight,
in the forward pass or in the recomputation of activation checkpointing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """Apply a 32-bit integer finalizer ("lowbias32" by C. Wellons) in int64 lanes."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def counter_uniform(keys_B: Tensor, positions: Tensor, dim: int, salt: int | Tensor) -> Tensor:
    """Return (B, T, dim) float32 uniform numbers in (0, 1).

    Args:
        keys_B: One int64 key per sequence.
        positions: (T,) or (B, T) positions of the tokens.
        dim: Channels.
        salt: Identifies the use (layer, site, loop), below 2^32; salts give independent numbers.
    """
    row = _mix((keys_B & _WORD) ^ _mix((keys_B >> 32) & _WORD) ^ ((salt * 0x9E3779B9) & _WORD))
    token = _mix((row.unsqueeze(-1) + positions * 0x85EBCA6B) & _WORD)
    channel = torch.arange(dim, device=keys_B.device) * 0xC2B2AE35
    bits = _mix((token.unsqueeze(-1) + channel) & _WORD)
    # 23 bits plus a half fit a float32 exactly, so 0 and 1 are impossible
    return ((bits >> 9).float() + 0.5) / (1 << 23)


def counter_normal(keys_B: Tensor, positions: Tensor, dim: int, salt: int) -> Tensor:
    """Return (B, T, dim) float32 standard normals truncated at three standard deviations."""
    tail = math.erfc(3 / math.sqrt(2)) / 2
    uniform = tail + (1 - 2 * tail) * counter_uniform(keys_B, positions, dim, salt)
    return math.sqrt(2) * torch.erfinv(2 * uniform - 1)


def counter_dropout(
    x_BTD: Tensor, p: float, keys_B: Tensor, positions: Tensor, salt: int | Tensor
) -> Tensor:
    """Zero each element with probability ``p`` and scale the rest by 1 / (1 - p)."""
    keep = counter_uniform(keys_B, positions, x_BTD.shape[-1], salt) >= p
    return torch.where(keep, x_BTD / (1 - p), torch.zeros_like(x_BTD))
