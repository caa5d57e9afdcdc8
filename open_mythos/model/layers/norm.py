"""Root-mean-square normalization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from open_mythos.checks import check_number, checked
from open_mythos.devices import at_least_float32
from open_mythos.ops.norm import rms_norm


class RMSNorm(nn.Module):
    """RMSNorm, x / rms(x) * weight (arXiv 1910.07467), computed in float32.

    Returns the dtype of the weight: a float32 state becomes the input of a bfloat16 layer.

    Args:
        dim: Width of the last axis.
        eps: Added to the mean square.
        keep_dtype: Return the dtype of the input instead of the weight's.
    """

    @checked
    def __init__(self, dim: int, eps: float = 1e-6, keep_dtype: bool = False) -> None:
        super().__init__()
        check_number("eps", eps, ge=0)
        self.eps, self.keep_dtype = eps, keep_dtype
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis of ``x``."""
        dtype = x.dtype if self.keep_dtype else self.weight.dtype
        weight_D = at_least_float32(self.weight)
        return rms_norm(at_least_float32(x), weight_D, self.eps).to(dtype)
