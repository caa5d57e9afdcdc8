"""The fused norm against PyTorch's, values, gradients and second derivatives, at odd sizes too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from open_mythos.errors import ConfigError
from open_mythos.ops.norm import rms_norm

SHAPES = [(3, 5, 7), (1, 1), (2, 33), (0, 4, 8), (4, 1, 64), (5,)]


def inputs(shape: tuple[int, ...], scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x = scale * torch.randn(shape, generator=generator) + 0.3
    weight = 1 + 0.5 * torch.randn(shape[-1:], generator=generator)
    return x.requires_grad_(), weight.requires_grad_()


def results(backend: str, x: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    y = rms_norm(x, weight, eps, backend=backend)
    signal = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return [y.detach(), *torch.autograd.grad(y, (x, weight), signal)]


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_plain_twin(shape, scale):
    x, weight = inputs(shape, scale)
    fused, plain = (results(name, x, weight, 1e-6) for name in ("auto", "reference"))
    for got, expected in zip(fused, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=3e-6 * max(1, 1 / scale))


def test_is_what_serves_a_cpu():
    x, weight = inputs((2, 8))
    assert "FusedNorm" in rms_norm(x, weight, 1e-6).grad_fn.name()
    assert "FusedNorm" not in rms_norm(x, weight, 1e-6, backend="reference").grad_fn.name()


def test_a_large_mean_does_not_spoil_the_gradient():
    """The kernel underneath subtracts a mean, which is put back."""
    x, weight = inputs((4, 256))
    y = [rms_norm(x, weight, 1e-6, backend=name) for name in ("fused", "reference")]
    got, expected = (torch.autograd.grad(each, x, 100 + torch.ones_like(each))[0] for each in y)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_only_what_needs_a_gradient(needed):
    x, weight = inputs((3, 6))
    x.requires_grad_(needed[0])
    weight.requires_grad_(needed[1])
    rms_norm(x, weight, 1e-6).sum().backward()
    assert (x.grad is not None, weight.grad is not None) == needed


def test_can_be_differentiated_twice():
    x, weight = (each.detach().double().requires_grad_() for each in inputs((3, 5)))

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, 1e-3, backend="fused")

    assert torch.autograd.gradcheck(call, (x, weight))
    assert torch.autograd.gradgradcheck(call, (x, weight))


def test_unknown_backend():
    x, weight = inputs((3, 5))
    with pytest.raises(ConfigError):
        rms_norm(x, weight, 1e-6, backend="magic")
