"""Leading eigenvalues and singular values of a matrix that is known only by its products.

Both methods build an orthonormal basis from repeated products and solve a small problem in it.
Source: Saad, Numerical Methods for Large Eigenvalue Problems (2nd ed., 2011), chapter 6; Golub and
Kahan (1965). The basis is orthogonalised twice at every step, so it stays orthonormal in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from open_mythos.config import check_count

Product = Callable[[Tensor], Tensor]
"""(n,) -> (n,) float32."""

_CHECK_EVERY = 5
_BREAKDOWN = 1e-6  # a new direction this small beside its vector is rounding: the space is closed


@dataclass(frozen=True)
class Spectrum:
    """Some eigenvalues or singular values, largest first."""

    values: np.ndarray
    """(k,) complex128 eigenvalues, or (k,) float64 singular values."""
    residuals: np.ndarray
    """(k,) ||M x - value x|| of the unit vector x that belongs to each value, by the method's own
    recurrence; 0 where the whole matrix was decomposed. Each value is exact for a matrix that
    differs from M by so much, which for a matrix far from normal does not bound its error."""
    products: int
    """Products with the matrix that were spent; 0 for a whole matrix."""

    @property
    def radius(self) -> float:
        """The largest magnitude."""
        return float(np.abs(self.values).max())


def leading_eigenvalues(
    apply: Product,
    size: int,
    count: int = 6,
    *,
    max_products: int = 200,
    tolerance: float = 1e-4,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Spectrum:
    """The ``count`` eigenvalues of largest magnitude, by Arnoldi's method without restarts.

    A complex pair has two values of one magnitude; an odd ``count`` may show one of them.

    Args:
        apply: v -> M v.
        size: n, the order of M.
        count: How many.
        max_products: Stop after so many products; the basis takes as many vectors of memory.
        tolerance: Stop when every residual is below this share of the largest value.
        seed: Of the starting vector.
        device: Where ``apply`` wants its vectors.
    """
    count = min(check_count("count", count), size)
    basis = [_start(size, seed, device)]
    columns: list[np.ndarray] = []
    below: list[float] = []
    while True:
        image = apply(basis[-1])
        scale = float(image.norm())
        image, column = _orthogonalise(image, basis)
        columns.append(column)
        below.append(float(image.norm()))
        m = len(basis)
        closed = m == size or below[-1] <= _BREAKDOWN * scale
        last = closed or m >= max_products
        if last or (m >= count and m % _CHECK_EVERY == 0):
            found = _ritz_values(columns, below, count, closed)
            if last or found.residuals.max() <= tolerance * found.radius:
                return found
        basis.append(image / below[-1])


def leading_singular_values(
    apply: Product,
    apply_transposed: Product,
    size: int,
    count: int = 6,
    *,
    max_products: int = 200,
    tolerance: float = 1e-4,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Spectrum:
    """The ``count`` largest singular values, by Golub-Kahan-Lanczos bidiagonalisation.

    Args:
        apply: v -> M v.
        apply_transposed: u -> M^T u.
        size: n, the order of M.
        count: How many.
        max_products: Stop after so many products with M and M^T together.
        tolerance: Stop when every residual is below this share of the largest value.
        seed: Of the starting vector.
        device: Where the products want their vectors.
    """
    count = min(check_count("count", count), size)
    right, left = [_start(size, seed, device)], list[Tensor]()
    diagonal: list[float] = []
    above: list[float] = []
    while True:
        image = apply(right[-1])
        scale = float(image.norm())
        image, _ = _orthogonalise(image, left)
        diagonal.append(float(image.norm()))
        left.append(image / max(diagonal[-1], torch.finfo(torch.float32).tiny))
        back, _ = _orthogonalise(apply_transposed(left[-1]), right)
        above.append(float(back.norm()))
        m = len(right)
        closed = m == size or above[-1] <= _BREAKDOWN * scale
        last = closed or 2 * m >= max_products
        if last or (m >= count and m % _CHECK_EVERY == 0):
            found = _bidiagonal_values(diagonal, above, count, closed)
            if last or found.residuals.max() <= tolerance * found.radius:
                return found
        right.append(back / above[-1])


def _ritz_values(
    columns: list[np.ndarray], below: list[float], count: int, closed: bool
) -> Spectrum:
    """Eigenvalues of the Hessenberg matrix; each column is one longer than the one before."""
    m = len(columns)
    hessenberg = np.diag(below[:-1], -1) if m > 1 else np.zeros((1, 1))
    for i, column in enumerate(columns):
        hessenberg[: i + 1, i] = column
    values, vectors = np.linalg.eig(hessenberg)
    order = np.argsort(-np.abs(values), kind="stable")[:count]
    residuals = (0.0 if closed else below[-1]) * np.abs(vectors[-1, order])
    return Spectrum(values[order].astype(complex), residuals, m)


def _bidiagonal_values(
    diagonal: list[float], above: list[float], count: int, closed: bool
) -> Spectrum:
    """Singular values of the bidiagonal matrix."""
    bidiagonal = np.diag(diagonal)
    bidiagonal += np.diag(above[:-1], 1) if len(above) > 1 else 0.0
    vectors, values, _ = np.linalg.svd(bidiagonal)
    residuals = (0.0 if closed else above[-1]) * np.abs(vectors[-1])
    return Spectrum(values[:count], residuals[:count], 2 * len(diagonal))


def _start(size: int, seed: int, device: torch.device | str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(size, generator=generator)
    return (v / v.norm()).to(device)


def _orthogonalise(v: Tensor, basis: list[Tensor]) -> tuple[Tensor, np.ndarray]:
    """``v`` without its part in the span of ``basis``, and the coefficients of that part."""
    total = np.zeros(len(basis))
    if not basis:
        return v, total
    q = torch.stack(basis)
    for _ in range(2):
        part = q @ v
        v = v - part @ q
        total += part.double().cpu().numpy()
    return v, total
