"""The linear part of one loop: h <- A h + B e, stable by construction."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_DECAY = 0.99609375
"""Upper bound of A: the largest bfloat16 below 1."""
MAX_EXPONENT = 16.0
"""Largest dt * a; exp(-16) = 1.1e-7 is above zero in every dtype, float16 included."""
MIN_EXPONENT = -math.log(MAX_DECAY)
INITIAL_DECAY = math.sqrt(1 / 5)


class LTIInjection(nn.Module):
    """Injects the encoded input into the state through a stable linear system.

    Source: Parcae, arXiv 2604.12946, section 4 and appendix C. Per channel, a = exp(log_A) > 0 and
    dt = softplus(dt_bias) > 0 give A = exp(-dt a). The input gain is the exact zero-order hold
    (1 - exp(-dt a)) / a, or dt by Euler's rule, times B.

    The product dt a is bounded so that A lies in (0, 0.99609375] for every value of the parameters,
    infinities included. A, dt and the state update are float32 whatever the dtype of the model:
    bfloat16 would round any A above 0.998 to 1.

    Usable in any looped model: ``injection(h, e)`` is A h + B e.

    Args:
        dim: Width D.
        rule: "zoh" or "euler".
        matrix: "full" (B is D x D) or "diagonal" (one gain per channel); both start at identity.
    """

    def __init__(self, dim: int, rule: str = "zoh", matrix: str = "full") -> None:
        super().__init__()
        self.rule = rule
        self.log_A = nn.Parameter(torch.zeros(dim))
        dt = -math.log(INITIAL_DECAY)
        self.dt_bias = nn.Parameter(torch.full((dim,), math.log(math.expm1(dt))))
        self.B = nn.Parameter(torch.eye(dim) if matrix == "full" else torch.ones(dim))

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """A (D,) and the input gain (D,), both float32."""
        # finite bounds first: an infinite a times a vanished dt would be NaN
        a = self.log_A.float().clamp(-30.0, 30.0).exp()
        dt = F.softplus(self.dt_bias.float().clamp(-60.0, 1e4))
        z = (dt * a).clamp(MIN_EXPONENT, MAX_EXPONENT)
        # (1 - exp(-z)) / z, exact for small z, is the hold's share of dt; where z met its bound,
        # the a that belongs to it is z / dt
        gain = dt if self.rule == "euler" else dt * (-torch.expm1(-z) / z)
        # the clamp absorbs the rounding of exp at the bound
        return torch.exp(-z).clamp(max=MAX_DECAY), gain

    def get_A(self) -> Tensor:
        """A as a (D, D) diagonal matrix, float32."""
        return torch.diag(self.coefficients()[0])

    def spectral_radius(self) -> Tensor:
        """rho(A), at most 0.99609375."""
        return self.coefficients()[0].max()

    def drive(self, e_BTD: Tensor) -> Tensor:
        """B e, float32: the same at every loop, so a loop computes it once."""
        mixed = e_BTD @ self.B.mT if self.B.dim() == 2 else e_BTD * self.B
        return mixed.float() * self.coefficients()[1]

    def hold(self, h_BTD: Tensor) -> Tensor:
        """A h, float32."""
        return self.coefficients()[0] * h_BTD.float()

    def forward(self, h_BTD: Tensor, e_BTD: Tensor) -> Tensor:
        """A h + B e, float32, (B, T, D)."""
        return self.hold(h_BTD) + self.drive(e_BTD)
