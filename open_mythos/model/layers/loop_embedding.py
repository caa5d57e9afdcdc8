"""Sinusoidal embedding of the loop index."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def loop_index_embedding(
    h_BTD: Tensor, loop_t: int | Tensor, loop_dim: int, theta: float = 10000.0
) -> Tensor:
    """Add the sinusoid of ``loop_t`` to the first ``loop_dim`` channels.

    Source: Universal Transformer, arXiv 1807.03819.

    Args:
        h_BTD: State, (..., D).
        loop_t: Loop index, or an int64 tensor of them, (B,) or (1,); not capped here.
        loop_dim: Channels that receive the signal, even and at most D.
        theta: Longest wavelength over 2 pi.
    """
    half = loop_dim // 2
    exponents = torch.arange(half, device=h_BTD.device, dtype=torch.float32) / max(half, 1)
    loop = loop_t.view(-1, 1, 1) if isinstance(loop_t, Tensor) else loop_t
    angles = loop * torch.exp(-math.log(theta) * exponents)
    signal = torch.cat((angles.sin(), angles.cos()), dim=-1)
    return h_BTD + torch.nn.functional.pad(signal, (0, h_BTD.shape[-1] - 2 * half)).to(h_BTD.dtype)
