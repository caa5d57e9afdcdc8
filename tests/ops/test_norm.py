"""The fused norm against PyTorch's, values, gradients and second derivatives, at odd sizes too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.ops.norm import rms_norm

Norm = Callable[[Tensor, Tensor, float], Tensor]
SHAPES = [(3, 5, 7), (1, 1), (2, 33), (0, 4, 8), (4, 1, 64), (5,)]


def inputs(shape: tuple[int, ...], scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x = scale * torch.randn(shape, generator=generator) + 0.3
    weight = 1 + 0.5 * torch.randn(shape[-1:], generator=generator)
    return x.requires_grad_(), weight.requires_grad_()


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def results(norm: Norm, x: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    y = norm(x, weight, eps)
    signal = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return [y.detach(), *torch.autograd.grad(y, (x, weight), signal)]


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape, scale):
    x, weight = inputs(shape, scale)
    fused, plain = (results(norm, x, weight, 1e-6) for norm in (rms_norm, reference))
    for got, expected in zip(fused, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=3e-6 * max(1, 1 / scale))


def test_serves_eager_calls_on_a_cpu_only():
    x, weight = inputs((2, 8))
    assert "FusedNorm" in rms_norm(x, weight, 1e-6).grad_fn.name()
    compiled = torch.compile(rms_norm, backend="eager", fullgraph=True)
    assert "FusedNorm" not in compiled(x, weight, 1e-6).grad_fn.name()


def test_a_large_mean_does_not_spoil_the_gradient():
    """The kernel underneath subtracts a mean, which is put back."""
    x, weight = inputs((4, 256))
    y = [norm(x, weight, 1e-6) for norm in (rms_norm, reference)]
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
        return rms_norm(x, weight, 1e-3)

    assert torch.autograd.gradcheck(call, (x, weight))
    assert torch.autograd.gradgradcheck(call, (x, weight))
