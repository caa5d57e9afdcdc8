"""Injection of the encoded input e into the state h, selected by ``injection``.

| ``injection`` | x | parameters |
|---|---|---|
| "lti" | A h + B e, A diagonal in (0, 1) | log_A, dt_bias, B |
| "concat" | A h + B e + b, unbounded; A = I with ``identity_carry`` | A, B, bias |
| "add" | h + e | |
| "none" | h | |

x is the float32 sum of ``hold(h)`` and ``drive(e)``; drive is computed once for all loops.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.checks import checked, pick
from open_mythos.config import MythosConfig
from open_mythos.devices import at_least_float32

logger = logging.getLogger(__name__)

MAX_DECAY = 0.99609375
"""Upper bound of A: the largest bfloat16 below 1."""
MAX_EXPONENT = 16.0
"""Upper bound of dt * a; exp(-16) = 1.1e-7 is positive even in float16."""
MIN_EXPONENT = -math.log(MAX_DECAY)
INITIAL_DECAY = math.sqrt(1 / 5)


class Injection(nn.Module):
    """x = hold(h) + drive(e); here the sum h + e, or h alone without ``with_input``."""

    def __init__(self, dim: int, with_input: bool = True) -> None:
        super().__init__()
        self.dim, self.with_input = dim, with_input

    def decay(self) -> Tensor | None:
        """Return A (D,) if :meth:`hold` would otherwise compute it at every loop, else None."""
        return None

    def hold(self, h_BTD: Tensor, decay: Tensor | None = None) -> Tensor:
        """Return A h, the part of x that depends on the state, float32.

        Args:
            h_BTD: The state.
            decay: Result of :meth:`decay`, if it is known.
        """
        return at_least_float32(h_BTD)

    def drive(self, e_BTD: Tensor) -> Tensor:
        """Return the loop-invariant part of x, float32."""
        e_BTD = at_least_float32(e_BTD)
        return e_BTD if self.with_input else torch.zeros_like(e_BTD)

    def get_A(self) -> Tensor:
        """Return the (D, D) matrix A, float32."""
        return torch.eye(self.dim)

    def spectral_radius(self) -> Tensor:
        """Return rho(A), the largest absolute eigenvalue."""
        return torch.ones(())

    def forward(
        self, h_BTD: Tensor | None, e_BTD: Tensor | None = None, decay: Tensor | None = None
    ) -> Tensor:
        """Return x (B, T, D), float32: ``hold(h, decay)``, ``drive(e)``, or their sum.

        Whoever calls the parts calls this method, so that wrappers such as adapters act.
        """
        parts = [] if h_BTD is None else [self.hold(h_BTD, decay)]
        parts += [] if e_BTD is None else [self.drive(e_BTD)]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


class LTIInjection(Injection):
    """Stable linear time-invariant injection, A h + B e.

    Source: Parcae, arXiv 2604.12946, section 4 and appendix C. Per channel, a = exp(log_A) > 0 and
    dt = softplus(dt_bias) > 0 give A = exp(-dt a). The input gain is the exact zero-order hold
    (1 - exp(-dt a)) / a, or dt by Euler's rule, times B.

    Bounds on dt a keep A in (0, 0.99609375] for all parameter values, infinities included. A, dt
    and the state update are float32 in every model: bfloat16 rounds any A above 0.998 to 1.

    Args:
        dim: Width D.
        rule: "zoh" or "euler".
        matrix: "full" (B is D x D) or "diagonal" (one gain per channel); both start at identity.
    """

    @checked
    def __init__(self, dim: int, rule: str = "zoh", matrix: str = "full") -> None:
        super().__init__(dim)
        pick(("zoh", "euler"), rule, "LTIInjection(rule)", what="injection rule")
        pick(("full", "diagonal"), matrix, "LTIInjection(matrix)", what="injection matrix")
        self.rule = rule
        self.log_A = nn.Parameter(torch.zeros(dim))
        dt = -math.log(INITIAL_DECAY)
        self.dt_bias = nn.Parameter(torch.full((dim,), math.log(math.expm1(dt))))
        self.B = nn.Parameter(torch.eye(dim) if matrix == "full" else torch.ones(dim))

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """Return A (D,) and the input gain (D,), both float32."""
        # clamp to finite values first: an infinite a times dt = 0 would be NaN
        a = at_least_float32(self.log_A).clamp(-30.0, 30.0).exp()
        dt = F.softplus(at_least_float32(self.dt_bias).clamp(-60.0, 1e4))
        z = (dt * a).clamp(MIN_EXPONENT, MAX_EXPONENT)
        # (1 - exp(-z)) / a with a = z / dt, accurate for small z and consistent where z is clamped
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
        return at_least_float32(_times(e_BTD, self.B)) * self.coefficients()[1]

    def decay(self) -> Tensor:
        """Return A (D,), float32."""
        return self.coefficients()[0]

    def hold(self, h_BTD: Tensor, decay: Tensor | None = None) -> Tensor:
        """Return A h, float32."""
        return (self.decay() if decay is None else decay) * at_least_float32(h_BTD)


class ConcatInjection(Injection):
    """Linear map of the concatenation [h; e]: A h + B e + b.

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
        super().__init__(dim)
        pick(("full", "diagonal"), matrix, "ConcatInjection(matrix)", what="injection matrix")

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
        A = at_least_float32(self.A)
        return A if A.dim() == 2 else torch.diag(A)

    def spectral_radius(self) -> Tensor:
        """Return rho(A), which may exceed 1; NaN if A is not finite."""
        A = self.get_A().detach()
        if not A.isfinite().all():
            return A.new_tensor(math.nan)
        return torch.linalg.eigvals(A).abs().max()

    def drive(self, e_BTD: Tensor) -> Tensor:
        """Return B e + b, float32."""
        driven = at_least_float32(_times(e_BTD, self.B))
        return driven if self.bias is None else driven + at_least_float32(self.bias)

    def hold(self, h_BTD: Tensor, decay: Tensor | None = None) -> Tensor:
        """Return A h, float32; a full A is applied in the dtype of the model."""
        return at_least_float32(h_BTD if self.A is None else _times(h_BTD, self.A))


def _times(x_BTD: Tensor, matrix: Tensor) -> Tensor:
    """Return ``x`` times a full (D, D) or a diagonal (D,) matrix, in the dtype of the matrix."""
    x_BTD = x_BTD.to(matrix.dtype)
    return x_BTD @ matrix.mT if matrix.dim() == 2 else x_BTD * matrix


INJECTIONS: dict[str, Callable[[MythosConfig], Injection]] = {
    "lti": lambda cfg: LTIInjection(cfg.dim, cfg.injection_rule, cfg.injection_matrix),
    "concat": lambda cfg: ConcatInjection(
        cfg.dim, cfg.injection_matrix, cfg.identity_carry, cfg.injection_bias
    ),
    "add": lambda cfg: Injection(cfg.dim),
    "none": lambda cfg: Injection(cfg.dim, with_input=False),
}
"""``injection`` -> constructor from the configuration."""


def injection_of(cfg: MythosConfig) -> Injection:
    """Build the injection that the configuration names."""
    if cfg.injection == "none" and cfg.initial_state != "prelude":
        logger.warning('injection="none" without initial_state="prelude" ignores the input tokens')
    return pick(INJECTIONS, cfg.injection, "MythosConfig.injection", what="injection")(cfg)
