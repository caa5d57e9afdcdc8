"""Leading eigenvalues and singular values of a matrix that is only available as matvecs.

Arnoldi's method builds an orthonormal basis of repeated matvecs and solves a small dense problem in
it. Source: Saad, Numerical Methods for Large Eigenvalue Problems (2nd ed., 2011), chapter 6. Each
new vector is orthogonalized twice, so the basis stays orthonormal in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from open_mythos.checks import check_count

MatVec = Callable[[Tensor], Tensor]
"""(n,) -> (n,) float32."""

_CHECK_EVERY = 5
_BREAKDOWN = 1e-6  # a new direction this small relative to its vector is rounding error


@dataclass(frozen=True)
class Spectrum:
    """Some eigenvalues or singular values, largest first."""

    values: np.ndarray
    """(k,) complex128 eigenvalues, or (k,) float64 singular values."""
    residuals: np.ndarray
    """(k,) ||M x - value x|| of the unit vector x that belongs to each value, by the method's own
    recurrence; 0 where the whole matrix was decomposed. Each value is exact for a matrix that
    differs from M by this much, which for a matrix far from normal does not bound its error."""
    products: int
    """Matvecs that were spent; 0 for a whole matrix."""

    @property
    def radius(self) -> float:
        """The largest magnitude."""
        return float(np.abs(self.values).max())


def leading_eigenvalues(
    apply: MatVec,
    size: int,
    count: int = 6,
    *,
    max_products: int = 200,
    tolerance: float = 1e-4,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Spectrum:
    """Find the ``count`` eigenvalues of largest magnitude by Arnoldi's method without restarts.

    A complex pair has two values of one magnitude; an odd ``count`` may show one of them.

    Args:
        apply: v -> M v.
        size: n, the order of M.
        count: Number of eigenvalues.
        max_products: Limit on matvecs; the basis takes as many vectors of memory.
        tolerance: Stop when every residual is below this fraction of the largest value.
        seed: Of the starting vector.
        device: Device of the vectors passed to ``apply``.
    """
    count = min(check_count("count", count), size)
    start = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    basis = [(start / start.norm()).to(device)]
    limit = max(1, min(max_products, size))
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


def leading_singular_values(
    apply: MatVec,
    apply_transposed: MatVec,
    size: int,
    count: int = 6,
    *,
    max_products: int = 200,
    tolerance: float = 1e-4,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Spectrum:
    """Find the ``count`` largest singular values: the roots of the eigenvalues of M^T M.

    Args:
        apply: v -> M v.
        apply_transposed: u -> M^T u.
        size: n, the order of M.
        count: Number of singular values.
        max_products: Limit on matvecs with M and M^T together.
        tolerance: Stop when every residual is below this fraction of the largest value.
        seed: Of the starting vector.
        device: Device of the vectors passed to both functions.
    """
    squares = leading_eigenvalues(
        lambda v: apply_transposed(apply(v)), size, count,
        max_products=max_products // 2, tolerance=tolerance, seed=seed, device=device,
    )  # fmt: skip
    values = np.sqrt(np.maximum(squares.values.real, 0.0))
    # with u = M v / s: M^T u - s v = (M^T M v - s^2 v) / s
    residuals = squares.residuals / np.maximum(values, np.finfo(np.float32).tiny)
    return Spectrum(values, residuals, 2 * squares.products)
