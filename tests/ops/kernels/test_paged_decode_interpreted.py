"""One token of each row over pages, by the kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import open_mythos.ops.kernels.paged_decode as kernel
from open_mythos.ops.attention.paged import PagedHistory, decode, kv_paged, latent_paged
from tests.ops.kernels.cases import (
    DTYPES,
    check_keys_and_values,
    check_latents,
    check_unpaged,
    pages,
    queries,
)

FLOAT = torch.float32


@pytest.fixture(autouse=True, params=[4096, 32], ids=["one part", "split"])
def _small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 entries, so that short histories have several; in one part and in parts of 2."""
    monkeypatch.setattr(kernel, "_ENTRY_BYTES", 1)
    monkeypatch.setattr(kernel, "_SPLIT", request.param)


@pytest.mark.parametrize("page", [1, 7, 16, 64])
@pytest.mark.parametrize("lengths", [[1], [33], [16, 3, 50]], ids=str)
def test_pages(lengths: list[int], page: int) -> None:
    check_latents(3, pages(lengths, 26, page, FLOAT), 20)
    check_keys_and_values(6, pages(lengths, 40, page, FLOAT), 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    check_latents(2, pages([20, 1, 37], 12, 8, dtype), 8)
    check_keys_and_values(4, pages([20, 1, 37], 48, 8, dtype), 2)


@pytest.mark.parametrize("heads", [16, 17, 33])
def test_heads_over_several_tiles(heads: int) -> None:
    check_latents(heads, pages([9, 3], 10, 4, FLOAT), 7)
    check_keys_and_values(3 * heads, pages([9, 3], 30, 4, FLOAT), 3)


@pytest.mark.parametrize(("rank", "width"), [(3, 5), (16, 16), (40, 43), (33, 66)])
def test_odd_widths(rank: int, width: int) -> None:
    check_latents(4, pages([19, 18], width, 8, torch.bfloat16), rank)
    check_keys_and_values(4, pages([19, 18], 2 * width, 8, torch.bfloat16), 1)


def test_a_row_does_not_depend_on_the_others_or_on_the_tables_width() -> None:
    history = pages([9, 33, 40, 300], 24, 8, FLOAT)
    q_RHW, q_RHK = queries((4, 3, 24), history.pool_NPW), queries((4, 4, 6), history.pool_NPW)

    def run(first: int, end: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        part = PagedHistory(
            history.pool_NPW, history.table_RM[first:end, :width], history.lengths_R[first:end]
        )
        own = slice(first, end)
        return latent_paged(q_RHW[own], part, 16, "triton"), kv_paged(q_RHK[own], part, 2, "triton")

    widths = [2, 5, 5, 38]
    alone = [run(row, row + 1, width) for row, width in enumerate(widths)]
    for together, parts in zip(run(0, 4, 38), zip(*alone, strict=True), strict=True):
        assert torch.equal(together, torch.cat(parts))


def test_a_row_that_sees_nothing_gets_zeros() -> None:
    history = pages([18, 18, 40], 12, 8, FLOAT)
    history = replace(history, lengths_R=torch.tensor([18, 0, 40]))
    out = latent_paged(queries((3, 2, 12), history.pool_NPW), history, 8, "triton")
    assert out[[0, 2]].abs().min() > 0
    assert not out[1].any()


def test_tables_and_lengths_of_any_strides() -> None:
    history = pages([21, 5, 40], 12, 8, torch.float16)
    levels = torch.stack((history.table_RM, 0 * history.table_RM), dim=1)
    strided = replace(
        history, table_RM=levels[:, 0], lengths_R=history.lengths_R.repeat_interleave(2)[::2]
    )
    assert not strided.table_RM.is_contiguous()
    check_latents(2, strided, 8)


@pytest.mark.parametrize(("batch", "positions"), [(1, 1), (1, 33), (3, 16), (2, 50)])
def test_a_slot_is_a_page(batch: int, positions: int) -> None:
    check_unpaged(3, torch.randn(batch, positions, 26), 20)
    check_unpaged(2, torch.randn(batch, positions + 3, 20)[:, 1:-2, :12], 8)


def test_padding_is_not_seen() -> None:
    valid_BS = torch.rand(3, 70) < 0.6
    valid_BS[:, 69] = True
    valid_BS[1, :40] = False  # a whole block, and a whole part
    check_unpaged(2, torch.randn(3, 70, 12), 8, valid_BS)
    entry_BSW = torch.randn(1, 70, 12)
    q_B1HW = queries((1, 1, 2, 12), entry_BSW)
    assert not decode(q_B1HW, entry_BSW, None, None, valid_BS[:1] & False, 8, 1.0).any()


def test_one_operation_to_torch_compile() -> None:
    history, q = pages([9, 40], 10, 8, FLOAT), torch.randn(2, 3, 10)

    def call(q: torch.Tensor) -> torch.Tensor:
        return latent_paged(2 * q, history, 8, backend="triton") + 1

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q), call(q))
