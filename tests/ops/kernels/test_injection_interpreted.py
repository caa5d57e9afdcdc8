"""Injection and norm in one pass: values, gradients and second gradients are the plain form's."""

from __future__ import annotations

import pytest
import torch

import open_mythos.ops.kernels.injection as kernel
from open_mythos.ops.injection import hold_and_norm
from tests.ops.kernels.cases import DTYPES, check_injection, injection_inputs, injection_results

SHAPES = [(1, 1, 7), (2, 3, 33), (37, 8), (2, 2, 300)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_plain_twin(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_injection(injection_inputs(shape, dtype))


@pytest.mark.parametrize("shape", [(2, 3, 33), (5, 64)], ids=str)
def test_slices_of_larger_tensors(shape: tuple[int, ...]) -> None:
    check_injection(injection_inputs(shape, torch.float32, strided=True))
    h, *others = injection_inputs(shape, torch.float32)
    check_injection([h.transpose(0, -1).contiguous().transpose(0, -1), *others])


@pytest.mark.parametrize("shift_shape", [(9,), (1, 1, 9), (3, 1, 9)], ids=str)
def test_shift_of_all_rows_or_of_each(shift_shape: tuple[int, ...]) -> None:
    check_injection(injection_inputs((3, 5, 9), torch.float32), shift=torch.randn(shift_shape))


def test_result_in_another_dtype() -> None:
    check_injection(injection_inputs((2, 5, 9), torch.float32), dtype=torch.bfloat16)


def test_several_tiles_for_each_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "PROGRAMS", 2)
    check_injection(injection_inputs((53, 700), torch.float32))  # 27 tiles, the last half full


def test_no_rows() -> None:
    check_injection(injection_inputs((0, 4, 9), torch.float32))


def test_a_run_is_repeated_bit_for_bit() -> None:
    inputs = injection_inputs((9, 4, 20), torch.bfloat16)
    first, second = (injection_results(inputs, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradient_of_the_gradient() -> None:
    """As for a Jacobian: the product J v is the gradient of the pullback of a zero cotangent."""
    inputs = injection_inputs((2, 3, 5), torch.float32)

    def products(backend: str) -> list[torch.Tensor]:
        leaves = [part.detach().requires_grad_() for part in inputs]
        x, y = hold_and_norm(*leaves, 1e-6, backend=backend)
        out = torch.cat((x, y.float()), -1)
        cotangent = torch.zeros_like(out, requires_grad=True)
        pulled = torch.autograd.grad(out, leaves, cotangent, create_graph=True)
        torch.manual_seed(2)
        return list(
            torch.autograd.grad(pulled, cotangent, [torch.randn_like(part) for part in pulled])
        )

    for got, expected in zip(products("triton"), products("reference"), strict=True):
        torch.testing.assert_close(got, expected)
