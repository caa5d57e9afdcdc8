"""Rotary position embedding (RoFormer, arXiv 2104.09864), halves rotated against each other.

Tables are built for the given positions, never for the whole context: three of the variants have a
million positions. Angles are computed in float64, because in float32 the angle of position 10^6 is
off by up to 0.06 radians, and stored as float32 cosines and sines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from open_mythos.checks import check_number, checked
from open_mythos.devices import at_least_float32


def rope_table(
    positions: Tensor, dim: int, theta: float, scaling: Mapping[str, Any] | None = None
) -> Tensor:
    """Compute cosines and sines for integer ``positions``.

    Args:
        positions: (T,) or (B, T) positions.
        dim: Rotary width K of a head, even.
        theta: Base of the frequencies.
        scaling: Of the frequencies, as ``rope_scaling`` of the configuration.

    Returns:
        (2, T, K/2) or (2, B, T, K/2) float32: cosines, then sines.
    """
    check_number("theta", theta, gt=0)
    # Apple's GPU backend has no float64
    wide = torch.float32 if positions.device.type == "mps" else torch.float64
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=wide) / dim
    frequencies = theta**-exponents
    if scaling:
        frequencies = _SCALED[scaling["rope_type"]](frequencies, scaling)
    angles = positions.to(wide).unsqueeze(-1) * frequencies
    return torch.stack((angles.cos(), angles.sin())).float()


def _linear(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Position interpolation (arXiv 2306.15595): every frequency divided by the factor."""
    return frequencies / scaling["factor"]


def _llama3(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: long wavelengths divided by the factor, short ones kept, the middle blended."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])


_SCALED = {"linear": _linear, "llama3": _llama3}


@checked
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
    first, second = at_least_float32(x_BTHK).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return rotated.to(x_BTHK.dtype)
