"""How one loop combines the state h and the encoded input e, selected by ``injection``.

| ``injection`` | x | parameters |
|---|---|---|
| "lti" | A h + B e, A diagonal in (0, 1) | log_A, dt_bias, B |
| "concat" | A h + B e + b, unbounded; A = I with ``identity_carry`` | A, B, bias |
| "add" | h + e | |
| "none" | h | |

Every injection has ``hold(h)``, the part that depends on the state, and ``drive(e)``, the part that
is the same at every loop and is computed once; x is their sum, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.checks import pick
from open_mythos.config import MythosConfig

MAX_DECAY = 0.99609375
"""Upper bound of A: the largest bfloat16 below 1."""
MAX_EXPONENT = 16.0
"""Largest dt * a; exp(-16) = 1.1e-7 is above zero in every dtype, float16 included."""
MIN_EXPONENT = -math.log(MAX_DECAY)
INITIAL_DECAY = math.sqrt(1 / 5)


class Injection(nn.Module):
    """Base of all injections: ``injection(h, e)`` is hold(h) + drive(e)."""

    def hold(self, h_BTD: Tensor) -> Tensor:
        """Return the part of x that depends on the state, float32."""
        raise NotImplementedError

    def drive(self, e_BTD: Tensor) -> Tensor:
        """Return the part of x that is the same at every loop, float32."""
        raise NotImplementedError

    def get_A(self) -> Tensor:
        """Return the (D, D) matrix A, float32."""
        raise NotImplementedError

    def spectral_radius(self) -> Tensor:
        """Return rho(A), the largest absolute eigenvalue."""
        raise NotImplementedError

    def forward(self, h_BTD: Tensor, e_BTD: Tensor) -> Tensor:
        """Return x (B, T, D), float32."""
        return self.hold(h_BTD) + self.drive(e_BTD)


class LTIInjection(Injection):
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
        """Return A (D,) and the input gain (D,), both float32."""
        # clamp to finite values first: an infinite a times dt = 0 would be NaN
        a = self.log_A.float().clamp(-30.0, 30.0).exp()
        dt = F.softplus(self.dt_bias.float().clamp(-60.0, 1e4))
        z = (dt * a).clamp(MIN_EXPONENT, MAX_EXPONENT)
        # (1 - exp(-z)) / z, exact for small z, is the hold's share of dt; where z met its bound,
        # the a that belongs to it is z / dt
        gain = dt if self.rule == "euler" else dt * (-torch.expm1(-z) / z)
        # the clamp absorbs the rounding of exp at the bound
        return torch.exp(-z).clamp(max=MAX_DECAY), gain

    def get_A(self) -> Tensor:
        """Return A as a (D, D) diagonal matrix, float32."""
        return torch.diag(self.coefficients()[0])

    def spectral_radius(self) -> Tensor:
        """Return rho(A), at most 0.99609375."""
        return self.coefficients()[0].max()

    def drive(self, e_BTD: Tensor) -> Tensor:
        """Return B e, float32."""
        mixed = _times(e_BTD, self.B)
        return mixed.float() * self.coefficients()[1]

    def hold(self, h_BTD: Tensor) -> Tensor:
        """Return A h, float32."""
        return self.coefficients()[0] * h_BTD.float()


class ConcatInjection(Injection):
    """x = A h + B e + b: the product of a matrix [A B] with the concatenation [h; e].

    Source: Huginn, arXiv 2502.05171, section 3. Nothing bounds A, so the linear part may expand.

    Args:
        dim: Width D.
        matrix: "full" (D x D matrices, normal with standard deviation sqrt(2 / (5 D))) or
            "diagonal" (one factor per channel; A starts at sqrt(1/5), B at 1).
        identity_carry: Fix A at the identity.
        bias: Add a learned bias b, zero at the start.
    """

    bias: Tensor | None

    def __init__(
        self, dim: int, matrix: str = "full", identity_carry: bool = False, bias: bool = False
    ) -> None:
        super().__init__()
        self.dim = dim

        def weight(start: float) -> nn.Parameter:
            if matrix == "diagonal":
                return nn.Parameter(torch.full((dim,), start))
            return nn.Parameter(torch.randn(dim, dim) * math.sqrt(2 / (5 * dim)))

        self.A = None if identity_carry else weight(INITIAL_DECAY)
        self.B = weight(1.0)
        self.register_parameter("bias", nn.Parameter(torch.zeros(dim)) if bias else None)

    def get_A(self) -> Tensor:
        """Return A as a (D, D) matrix, float32."""
        if self.A is None:
            return torch.eye(self.dim, device=self.B.device)
        return self.A.float() if self.A.dim() == 2 else torch.diag(self.A.float())

    def spectral_radius(self) -> Tensor:
        """Return rho(A), which may exceed 1; NaN if A is not finite."""
        A = self.get_A().detach()
        if not A.isfinite().all():
            return A.new_tensor(math.nan)
        return torch.linalg.eigvals(A).abs().max()

    def drive(self, e_BTD: Tensor) -> Tensor:
        """Return B e + b, float32."""
        driven = _times(e_BTD, self.B).float()
        return driven if self.bias is None else driven + self.bias.float()

    def hold(self, h_BTD: Tensor) -> Tensor:
        """Return A h, float32; a matrix multiplies in the dtype of the model."""
        return h_BTD.float() if self.A is None else _times(h_BTD, self.A).float()


class AddInjection(Injection):
    """x = h + e.

    Args:
        dim: Width D.
        with_input: Whether e is added at all; without it x = h.
    """

    def __init__(self, dim: int, with_input: bool = True) -> None:
        super().__init__()
        self.dim, self.with_input = dim, with_input

    def get_A(self) -> Tensor:
        """Return the (D, D) identity, float32."""
        return torch.eye(self.dim)

    def spectral_radius(self) -> Tensor:
        """Return 1."""
        return torch.ones(())

    def drive(self, e_BTD: Tensor) -> Tensor:
        """Return e, or zeros without an input, float32."""
        return e_BTD.float() if self.with_input else torch.zeros_like(e_BTD, dtype=torch.float32)

    def hold(self, h_BTD: Tensor) -> Tensor:
        """Return h, float32."""
        return h_BTD.float()


def _times(x_BTD: Tensor, matrix: Tensor) -> Tensor:
    """Return ``x`` times a full (D, D) or a diagonal (D,) matrix, in the dtype of the matrix."""
    x_BTD = x_BTD.to(matrix.dtype)
    return x_BTD @ matrix.mT if matrix.dim() == 2 else x_BTD * matrix


def _lti(cfg: MythosConfig) -> Injection:
    return LTIInjection(cfg.dim, cfg.injection_rule, cfg.injection_matrix)


def _concat(cfg: MythosConfig) -> Injection:
    return ConcatInjection(cfg.dim, cfg.injection_matrix, cfg.identity_carry, cfg.injection_bias)


INJECTIONS: dict[str, Callable[[MythosConfig], Injection]] = {
    "lti": _lti,
    "concat": _concat,
    "add": lambda cfg: AddInjection(cfg.dim),
    "none": lambda cfg: AddInjection(cfg.dim, with_input=False),
}
"""``injection`` -> constructor from the configuration."""


def injection_of(cfg: MythosConfig) -> Injection:
    """Build the injection that the configuration names."""
    return pick(INJECTIONS, cfg.injection, "MythosConfig.injection", what="injection")(cfg)
