"""Weight gradient over all loops, from rows read in place."""

from __future__ import annotations

import pytest
import torch

from tests.ops.kernels.cases import DTYPES, check_weight_gradient, expert_rows

COUNTS = {
    "one row": [[1]],
    "one loop": [[3, 5, 1]],
    "three loops": [[2, 0, 7, 1], [0, 3, 1, 1], [4, 4, 0, 0]],
    "an expert without rows": [[5, 0, 2], [1, 0, 6]],
    "a loop without rows": [[2, 2], [0, 0], [1, 3]],
    "no rows at all": [[0, 0], [0, 0]],
    "several blocks of rows": [[70, 3], [1, 90], [61, 0]],
}


@pytest.mark.parametrize("name", COUNTS)
def test_equals_the_reference(name: str) -> None:
    check_weight_gradient(*expert_rows(COUNTS[name], 20, 13, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    check_weight_gradient(*expert_rows(COUNTS["three loops"], 24, 40, dtype))


@pytest.mark.parametrize(("k", "m"), [(1, 1), (16, 16), (7, 130), (129, 5)])
def test_odd_widths(k: int, m: int) -> None:
    check_weight_gradient(*expert_rows(COUNTS["three loops"], k, m, torch.float32))


def test_loops_that_keep_different_numbers_of_rows() -> None:
    check_weight_gradient(
        *expert_rows([[9, 8], [4, 4], [1, 0], [0, 1], [2, 0]], 16, 16, torch.float16)
    )


def test_slices_of_larger_tensors() -> None:
    """Rows of a wider tensor are copied; unaligned rows are read in place."""
    xs, grads, ends = expert_rows([[0, 2, 2], [2, 1, 2]], 12, 9, torch.bfloat16)
    wide = [torch.cat((x, x), 1)[:, 5:17] for x in xs]
    shifted = [torch.cat((grad.new_zeros(1), grad.flatten()))[1:].view_as(grad) for grad in grads]
    assert any(grad.data_ptr() % 16 for grad in shifted)
    check_weight_gradient(wide, shifted, ends)


def test_accumulates_in_float32() -> None:
    """A sum of 600 ones stops at 256 if it is kept in bfloat16."""
    ones = [torch.ones(200, 1, dtype=torch.bfloat16) for _ in range(3)]
    ends = [torch.tensor([200], dtype=torch.int32)] * 3
    assert check_weight_gradient(ones, ones, ends).item() == 600


def test_a_run_is_repeated_bit_for_bit() -> None:
    rows = expert_rows(COUNTS["several blocks of rows"], 20, 13, torch.float32)
    assert torch.equal(check_weight_gradient(*rows), check_weight_gradient(*rows))
