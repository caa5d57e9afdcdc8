"""Leading eigenvalues and singular values of a matrix that is only available as matvecs.

Source: Arnoldi's method without restarts, Saad, Numerical Methods for Large Eigenvalue Problems
(2nd ed., 2011), chapter 6. Each new basis vector is orthogonalized twice, so that the basis stays
orthonormal in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from open_mythos.checks import check_count, check_number, checked

MatVec = Callable[[Tensor], Tensor]
"""(n,) -> (n,) float32."""

_CHECK_EVERY = 5
_BREAKDOWN = 1e-6  # a new direction this small relative to its vector is rounding error


@dataclass(frozen=True)
class Spectrum:
    """Leading eigenvalues or singular values, largest first."""

    values: np.ndarray
    """(k,) complex128 eigenvalues, or (k,) float64 singular values."""
    residuals: np.ndarray
    """(k,) ||M x - value x|| for the unit vector x of each value; 0 where the whole matrix was
    decomposed. Each value is exact for a matrix this close to M, which does not bound its error
    when M is far from normal."""
    matvecs: int
    """Matvecs computed; 0 for a whole matrix."""

    @property
    def radius(self) -> float:
        """The largest magnitude."""
        return float(np.abs(self.values).max())


@checked
def leading_eigenvalues(
    apply: MatVec,
    size: int,
    count: int = 6,
    *,
    max_matvecs: int = 200,
    tolerance: float = 1e-4,
    device: torch.device | str = "cpu",
) -> Spectrum:
    """Find the ``count`` eigenvalues of largest magnitude.

    Args:
        apply: v -> M v.
        size: n, the order of M.
        count: Number of eigenvalues; an odd one may return one value of a complex pair.
        max_matvecs: Limit on matvecs; each keeps one vector in memory.
        tolerance: Stop when every residual is below this fraction of the largest magnitude.
        device: Device of the vectors passed to ``apply``.
    """
    check_number("tolerance", tolerance, ge=0)
    check_count("max_matvecs", max_matvecs)
    count = min(check_count("count", count), check_count("size", size))
    start = torch.randn(size, generator=torch.Generator().manual_seed(0))
    basis = [(start / start.norm()).to(device)]
    limit = max(1, min(max_matvecs, size))
    hessenberg = np.zeros((limit + 1, limit))
    for m in range(1, limit + 1):
        image = apply(basis[-1])
        scale = float(image.norm())
        q = torch.stack(basis)
        for _ in range(2):
            part = q @ image
            image = image - part @ q
            hessenberg[:m, m - 1] += part.double().cpu().numpy()
        below = hessenberg[m, m - 1] = float(image.norm())
        closed = m == size or below <= _BREAKDOWN * scale
        if closed or m == limit or (m >= count and m % _CHECK_EVERY == 0):
            values, vectors = np.linalg.eig(hessenberg[:m, :m])
            order = np.argsort(-np.abs(values), kind="stable")[:count]
            residuals = (0.0 if closed else below) * np.abs(vectors[-1, order])
            found = Spectrum(values[order].astype(complex), residuals, m)
            if closed or residuals.max() <= tolerance * found.radius:
                break
        basis.append(image / below)
    return found


@checked
def leading_singular_values(
    apply: MatVec,
    apply_transposed: MatVec,
    size: int,
    count: int = 6,
    *,
    max_matvecs: int = 200,
    tolerance: float = 1e-4,
    device: torch.device | str = "cpu",
) -> Spectrum:
    """Find the ``count`` largest singular values, as square roots of the eigenvalues of M^T M.

    ``apply_transposed`` maps u to M^T u; see :func:`leading_eigenvalues` for the other arguments.
    ``max_matvecs`` counts those with M and M^T together.
    """
    most = max(1, check_count("max_matvecs", max_matvecs) // 2)
    squares = leading_eigenvalues(
        lambda v: apply_transposed(apply(v)), size, count,
        max_matvecs=most, tolerance=tolerance, device=device,
    )  # fmt: skip
    values = np.sqrt(np.maximum(squares.values.real, 0.0))
    # with u = M v / s: M^T u - s v = (M^T M v - s^2 v) / s
    residuals = squares.residuals / np.maximum(values, np.finfo(np.float32).tiny)
    return Spectrum(values, residuals, 2 * squares.matvecs)
