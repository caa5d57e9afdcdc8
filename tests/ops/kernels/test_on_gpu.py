"""The kernels on a real GPU, at real sizes: ``pytest -m gpu tests/ops/kernels``."""

from __future__ import annotations

import pytest
import torch

from open_mythos.ops.attention import latent_decode as decoding
from open_mythos.ops.attention.latent_decode import latent_decode
from open_mythos.ops.experts.weight_gradient import grouped_weight_gradient, kernel_serves
from tests.ops.kernels.cases import (
    DTYPES,
    check_decode,
    check_weight_gradient,
    error,
    expert_rows,
    slots,
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


@pytest.mark.parametrize("dtype", [HALF, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "rank", "rotary"),
    [(16, 256, 32), (24, 384, 32), (32, 512, 64), (128, 512, 64), (96, 1024, 64), (3, 40, 6)],
)
@pytest.mark.parametrize(("batch", "positions"), [(1, 4096), (7, 2049), (64, 300)])
def test_decode(
    batch: int, positions: int, heads: int, rank: int, rotary: int, dtype: torch.dtype
) -> None:
    entries = slots((3, batch, positions, rank + rotary), dtype, "cuda")
    loops = torch.randint(0, 3, (batch,)).tolist()
    lengths = torch.randint(1, positions + 1, (batch,)).tolist()
    check_decode(heads, entries, loops, lengths, rank)
    check_decode(heads, entries[:1], None, None, rank)


@pytest.mark.parametrize(("heads", "rank"), [(16, 256), (40, 512), (2, 20)])
def test_decode_in_float32(heads: int, rank: int) -> None:
    entries = slots((2, 3, 777, rank + 64), torch.float32, "cuda")
    check_decode(heads, entries, [1, 0, 1], [777, 16, 333], rank)


def test_decode_with_padding_in_strided_slots() -> None:
    entries = slots((4, 5, 1000, 288), HALF, "cuda", strided=True)
    valid_BS = torch.rand(5, 1000, device="cuda") < 0.7
    check_decode(16, entries, [3, 1, 0, 2, 3], [1000, 1, 512, 999, 0], 256, valid_BS)


@pytest.mark.filterwarnings("ignore:.*:UserWarning:torch")
def test_decode_in_a_cuda_graph_and_compiled() -> None:
    """Loops and lengths are read when the graph runs, not when it was recorded."""
    entries, q = slots((3, 4, 512, 288), HALF, "cuda"), torch.randn(4, 16, 288, device="cuda")
    q = (q / 288**0.5).to(HALF)
    assert decoding.kernel_serves(q, entries, 256)
    loops = torch.zeros(4, dtype=torch.long, device="cuda")
    lengths = torch.full((4,), 512, dtype=torch.long, device="cuda")

    def call() -> torch.Tensor:
        return latent_decode(q, entries, loops, lengths, 256)

    call()  # compiled outside of the graph
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    loops.copy_(torch.tensor([2, 0, 1, 1]))
    lengths.copy_(torch.tensor([5, 512, 100, 1]))
    graph.replay()
    expected = latent_decode(q, entries, loops, lengths, 256, backend="reference")
    assert error(out, expected) < 8e-3
    assert torch.equal(torch.compile(call, fullgraph=True)(), out)
