"""The small case that decides whether "auto" picks a kernel on a device."""

from __future__ import annotations

import pytest
import torch

import open_mythos.ops.attention.paged
import open_mythos.ops.experts.weight_gradient  # noqa: F401  each of the two registers its case
from open_mythos.ops.backend import CHECKS, TOLERANCE
from tests.ops.kernels.cases import error


@pytest.mark.parametrize("op", ["grouped_weight_gradient", "paged_decode"])
def test_kernel_and_reference_agree(op: str) -> None:
    got, expected = CHECKS[op](torch.device("cpu"))
    assert expected.abs().sum() > 0
    assert error(got, expected) < 0.1 * TOLERANCE
