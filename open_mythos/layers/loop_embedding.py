"""A sinusoidal embedding of the loop index."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def loop_signal(
    loop_t: int | Tensor, loop_dim: int, dim: int, device: torch.device, theta: float = 10000.0
) -> Tensor:
    """The sinusoid of ``loop_t`` in the first ``loop_dim`` of ``dim`` channels, 0 in the others.

    (D,) float32, or (B, 1, D) for loops of each row; see :func:`loop_index_embedding`.
    """
    half = loop_dim // 2
    exponents = torch.arange(half, device=device, dtype=torch.float32) / max(half, 1)
    loop = loop_t.view(-1, 1, 1) if isinstance(loop_t, Tensor) else loop_t
    angles = loop * torch.exp(-math.log(theta) * exponents)
    signal = torch.cat((angles.sin(), angles.cos()), dim=-1)
    return torch.nn.functional.pad(signal, (0, dim - 2 * half))


def loop_index_embedding(
    h_BTD: Tensor, loop_t: int | Tensor, loop_dim: int, theta: float = 10000.0
) -> Tensor:
    """Add the sinusoid of ``loop_t`` to the first ``loop_dim`` channels (Universal Transformer,
    arXiv 1807.03819: a position signal over depth).

    Args:
        h_BTD: State, (..., D).
        loop_t: Loop index, or (B,) int64 of them, one per row ((1,) for all); the caller caps it at
            the last trained one.
        loop_dim: Channels that receive the signal, even and at most D.
        theta: Longest wavelength of the sinusoids, over 2 pi.
    """
    signal = loop_signal(loop_t, loop_dim, h_BTD.shape[-1], h_BTD.device, theta)
    return h_BTD + signal.to(h_BTD.dtype)
