"""The kernels on a real GPU, at real sizes: ``pytest -m gpu tests/ops/kernels``."""

from __future__ import annotations

import pytest
import torch

from open_mythos.ops.attention import paged
from open_mythos.ops.attention.paged import PagedHistory, kv_paged, latent_paged
from open_mythos.ops.experts.weight_gradient import grouped_weight_gradient, kernel_serves
from tests.ops.kernels.cases import (
    DTYPES,
    check_keys_and_values,
    check_latents,
    check_unpaged,
    check_weight_gradient,
    error,
    expert_rows,
    pages,
    queries,
)

pytestmark = [
    pytest.mark.gpu,
    # Triton announces a default that its next version changes
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]
HALF = torch.bfloat16


def draws(rows: int, columns: int, highest: int) -> list[list[int]]:
    return torch.randint(0, highest + 1, (rows, columns)).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("loops", "experts", "highest", "k", "m"),
    [(8, 64, 40, 2048, 1024), (16, 128, 12, 512, 2048), (3, 5, 700, 200, 136), (1, 1, 9, 16, 16)],
)
def test_weight_gradient(
    loops: int, experts: int, highest: int, k: int, m: int, dtype: torch.dtype
) -> None:
    check_weight_gradient(*expert_rows(draws(loops, experts, highest), k, m, dtype, "cuda"))


def test_weight_gradient_of_odd_widths_and_empty_experts() -> None:
    counts = [[0, 300, 0, 17], [0, 1, 0, 64], [0, 0, 0, 3]]
    check_weight_gradient(*expert_rows(counts, 129, 77, HALF, "cuda"))


def test_weight_gradient_waits_for_nothing() -> None:
    """No host synchronisation: the CUDA runtime would raise at one."""
    xs, grads, ends = expert_rows(draws(4, 16, 30), 256, 512, HALF, "cuda")
    assert kernel_serves(xs, grads)
    first = grouped_weight_gradient(xs, grads, ends)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = grouped_weight_gradient(xs, grads, ends)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)


def lengths_of(batch: int, positions: int) -> list[int]:
    return torch.randint(1, positions + 1, (batch,)).tolist()


@pytest.mark.parametrize("dtype", [HALF, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "rank", "rotary"),
    [(16, 256, 32), (24, 384, 32), (32, 512, 64), (128, 512, 64), (96, 1024, 64), (3, 40, 6)],
)
@pytest.mark.parametrize(("batch", "positions"), [(1, 4096), (7, 2049), (64, 300)])
def test_latents(
    batch: int, positions: int, heads: int, rank: int, rotary: int, dtype: torch.dtype
) -> None:
    lengths = lengths_of(batch, positions)
    check_latents(heads, pages(lengths, rank + rotary, 64, dtype, "cuda"), rank)
    entry_BSW = torch.randn(batch, positions, rank + rotary, device="cuda").to(dtype)
    check_unpaged(heads, entry_BSW, rank)


@pytest.mark.parametrize("dtype", [HALF, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(32, 8, 128), (16, 16, 64), (6, 2, 40)])
@pytest.mark.parametrize(("batch", "positions"), [(1, 4096), (7, 2049), (64, 300)])
def test_keys_and_values(
    batch: int, positions: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype
) -> None:
    history = pages(lengths_of(batch, positions), 2 * kv_heads * width, 64, dtype, "cuda")
    check_keys_and_values(heads, history, kv_heads)


@pytest.mark.parametrize(("heads", "rank"), [(16, 256), (40, 512), (2, 20)])
def test_paged_attention_in_float32(heads: int, rank: int) -> None:
    history = pages([777, 16, 333], rank + 64, 16, torch.float32, "cuda")
    check_latents(heads, history, rank)
    check_keys_and_values(heads, history, 2)


def test_padding_in_strided_slots() -> None:
    valid_BS = torch.rand(5, 1000, device="cuda") < 0.7
    valid_BS[:, 0] = True
    whole = torch.randn(5, 1003, 296, device="cuda").to(HALF)
    check_unpaged(16, whole[:, 1:-2, :288], 256, valid_BS)


@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
def test_bits_of_a_row_do_not_depend_on_the_other_rows(dtype: torch.dtype) -> None:
    """Nor on how far the table reaches, which decides how many programs there are."""
    history = pages(sorted(lengths_of(48, 3000)), 288, 64, dtype, "cuda")
    q_RHW, q_RHK = (queries((48, 16, width), history.pool_NPW) / 16 for width in (288, 36))
    together = latent_paged(q_RHW, history, 256), kv_paged(q_RHK, history, 4)
    for row, length in enumerate(history.lengths_R.tolist()):
        own = slice(row, row + 1)
        table_RM = history.table_RM[own, : -(-length // 64)]
        alone = PagedHistory(history.pool_NPW, table_RM, history.lengths_R[own])
        assert torch.equal(latent_paged(q_RHW[own], alone, 256), together[0][own])
        assert torch.equal(kv_paged(q_RHK[own], alone, 4), together[1][own])


@pytest.mark.filterwarnings("ignore:.*:UserWarning:torch")
def test_paged_attention_in_a_cuda_graph_and_compiled() -> None:
    """Tables and lengths are read when the graph runs, not when it was recorded."""
    history = pages([512] * 4, 288, 64, HALF, "cuda")
    q = queries((4, 16, 288), history.pool_NPW) / 16
    assert paged.kernel_serves(q.unsqueeze(1), history.pool_NPW, 256)

    def call() -> torch.Tensor:
        return latent_paged(q, history, 256)

    call()  # compiled outside of the graph
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    history.table_RM.copy_(history.table_RM.flip(0))
    history.lengths_R.copy_(torch.tensor([5, 512, 100, 1]))
    graph.replay()
    assert error(out, latent_paged(q, history, 256, "reference")) < 8e-3
    assert torch.equal(torch.compile(call, fullgraph=True)(), out)
