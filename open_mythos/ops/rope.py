"""Rotary position embedding (RoFormer, arXiv 2104.09864), halves rotated against each other.

Tables are built for the given positions, never for the whole context: three of the variants have a
million positions. Angles are computed in float64, because in float32 the angle of position 10^6 is
off by up to 0.06 radians, and stored as float32 cosines and sines.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(positions: Tensor, dim: int, theta: float) -> Tensor:
    """Compute cosines and sines for integer ``positions``.

    Args:
        positions: (T,) or (B, T) positions.
        dim: Rotary width K of a head, even.
        theta: Base of the frequencies.

    Returns:
        (2, T, K/2) or (2, B, T, K/2) float32: cosines, then sines.
    """
    # Apple's GPU backend has no float64
    wide = torch.float32 if positions.device.type == "mps" else torch.float64
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=wide) / dim
    angles = positions.to(wide).unsqueeze(-1) * theta**-exponents
    return torch.stack((angles.cos(), angles.sin())).float()


def precompute_rope_freqs(dim: int, max_len: int, theta: float = 500000.0) -> Tensor:
    """Return the (2, max_len, dim/2) table of positions 0 .. max_len - 1."""
    return rope_table(torch.arange(max_len), dim, theta)


def apply_rope(x_BTHK: Tensor, rope: Tensor) -> Tensor:
    """Rotate every head of ``x_BTHK`` by its position; returns the shape and dtype of x.

    Args:
        x_BTHK: Queries or keys (B, T, heads, K).
        rope: Table from :func:`rope_table`, (2, T, K/2) or (2, B, T, K/2).
    """
    cos, sin = rope[0].unsqueeze(-2), rope[1].unsqueeze(-2)
    first, second = x_BTHK.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return rotated.to(x_BTHK.dtype)
