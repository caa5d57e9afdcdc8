"""Products alone give what a decomposition of the whole matrix gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from open_mythos.dynamics import leading_eigenvalues, leading_singular_values


def random_matrix(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, n, generator=torch.Generator().manual_seed(seed)) / n**0.5


def by_magnitude(values: np.ndarray) -> np.ndarray:
    return values[np.argsort(-np.abs(values), kind="stable")]


def test_eigenvalues_of_a_normal_matrix():
    """Known values, real and complex, in a random orthonormal basis."""
    q = torch.linalg.qr(random_matrix(60)).Q
    block = torch.diag(torch.cat((torch.tensor([-0.95]), torch.linspace(0.5, 0.0, 59))))
    turn = 0.9 * torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    block[1:3, 1:3] = turn
    matrix = q @ block @ q.T
    found = leading_eigenvalues(lambda v: matrix @ v, 60, 3)
    assert found.values == pytest.approx([-0.95, 0.54 + 0.72j, 0.54 - 0.72j], abs=1e-4) or (
        found.values == pytest.approx([-0.95, 0.54 - 0.72j, 0.54 + 0.72j], abs=1e-4)
    )
    assert found.radius == pytest.approx(0.95, abs=1e-5)
    assert found.matvecs < 60
    assert found.residuals.max() <= 1e-4


@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_a_whole_space_is_exact(n):
    """With as many products as dimensions nothing is left to estimate."""
    matrix = random_matrix(n)
    eigen = leading_eigenvalues(lambda v: matrix @ v, n, n)
    exact = by_magnitude(np.linalg.eigvals(matrix.double().numpy()))
    assert np.abs(eigen.values) == pytest.approx(np.abs(exact), abs=1e-4)
    assert eigen.residuals.max() == 0
    singular = leading_singular_values(lambda v: matrix @ v, lambda u: matrix.T @ u, n, n)
    assert singular.values == pytest.approx(torch.linalg.svdvals(matrix).numpy(), abs=1e-5)


def test_singular_values_of_a_random_matrix():
    matrix = random_matrix(300)
    found = leading_singular_values(lambda v: matrix @ v, lambda u: matrix.T @ u, 300, 4)
    assert found.values == pytest.approx(torch.linalg.svdvals(matrix)[:4].numpy(), rel=1e-3)
    assert found.matvecs < 300


def test_a_closed_space_ends_the_search():
    """The start's orbit spans one dimension under the identity, few under a low-rank matrix."""
    found = leading_eigenvalues(lambda v: 0.5 * v, 50, 4)
    assert (found.values.tolist(), found.matvecs) == ([pytest.approx(0.5)], 1)
    rank_one = torch.outer(torch.ones(50), torch.ones(50)) / 50
    found = leading_singular_values(lambda v: rank_one @ v, lambda u: rank_one.T @ u, 50, 2)
    assert found.radius == pytest.approx(1, abs=1e-5)
    zero = leading_eigenvalues(torch.zeros_like, 50, 2)
    assert zero.radius == 0
    assert leading_singular_values(torch.zeros_like, torch.zeros_like, 50, 2).radius == 0


def test_too_few_products_are_confessed():
    """The residual says what the values are worth."""
    matrix = random_matrix(200)
    found = leading_eigenvalues(lambda v: matrix @ v, 200, 2, max_matvecs=8)
    assert found.matvecs == 8
    assert found.residuals.max() > 0.05
    svd = leading_singular_values(
        lambda v: matrix @ v, lambda u: matrix.T @ u, 200, 2, max_matvecs=8
    )
    assert (svd.matvecs, len(svd.values)) == (8, 2)
    assert svd.residuals.max() > 0.05


def test_residuals_are_those_of_the_matrix():
    """For a normal matrix a residual bounds the error."""
    basis = torch.linalg.qr(random_matrix(80)).Q
    values = torch.linspace(-1, 1, 80)
    matrix = basis @ torch.diag(values) @ basis.T
    found = leading_eigenvalues(lambda v: matrix @ v, 80, 4, max_matvecs=30, tolerance=0)
    for value, residual in zip(found.values.real, found.residuals, strict=True):
        assert (values - value).abs().min() <= residual + 1e-5
