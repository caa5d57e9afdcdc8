"""One token of each row over a latent cache, each row in the slot of its own loop."""

from __future__ import annotations

import pytest
import torch

import open_mythos.ops.kernels.latent_decode as kernel
from open_mythos.ops.attention.latent_decode import latent_decode
from tests.ops.kernels.cases import DTYPES, check_decode, slots


@pytest.fixture(autouse=True, params=["one part", "split"])
def _small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 entries, so that short histories have several; in one part and in three."""
    monkeypatch.setattr(kernel, "_ENTRY_BYTES", 1)
    parts = 3 if request.param == "split" else 1
    monkeypatch.setattr(kernel, "_splits", lambda *_: parts)


@pytest.mark.parametrize(("batch", "positions"), [(1, 1), (1, 33), (3, 16), (2, 50)])
def test_one_slot(batch: int, positions: int) -> None:
    check_decode(3, slots((1, batch, positions, 26), torch.float32), None, None, 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_row_in_its_own_loop(dtype: torch.dtype) -> None:
    check_decode(2, slots((4, 5, 20, 12), dtype), [3, 0, 2, 2, 1], [20, 1, 16, 17, 9], 8)


def test_loops_outside_read_the_nearest_slot() -> None:
    entries = slots((2, 3, 5, 6), torch.float32)
    check_decode(1, entries, [7, -1, 2], None, 4)


@pytest.mark.parametrize("heads", [16, 17, 33])
def test_heads_over_several_tiles(heads: int) -> None:
    check_decode(heads, slots((1, 2, 9, 10), torch.float32), None, [9, 3], 7)


@pytest.mark.parametrize(("rank", "width"), [(3, 5), (16, 16), (40, 43), (33, 66)])
def test_odd_widths(rank: int, width: int) -> None:
    check_decode(4, slots((2, 2, 19, width), torch.bfloat16), [1, 0], [19, 18], rank)


def test_padding_is_not_seen() -> None:
    valid_BS = torch.rand(3, 35) < 0.6
    valid_BS[1, :20] = False  # a whole block, and a whole part
    check_decode(2, slots((1, 3, 35, 12), torch.float32), None, [35, 30, 8], 8, valid_BS)
    check_decode(2, slots((1, 3, 35, 12), torch.float32), None, None, 8, valid_BS[:1].expand(3, -1))


def test_a_row_that_sees_nothing_gets_zeros() -> None:
    valid_BS = torch.tensor([[True] * 18, [False] * 18, [True] * 18])
    out = check_decode(2, slots((1, 3, 18, 12), torch.float32), None, [18, 18, 0], 8, valid_BS)
    assert out[0].abs().min() > 0
    assert not out[1:].any()


def test_strided_slots() -> None:
    check_decode(
        2, slots((3, 4, 21, 12), torch.float16, strided=True), [2, 1, 0, 2], [21, 5, 1, 9], 8
    )


def test_what_is_not_seen_may_be_anything() -> None:
    entries = slots((2, 2, 40, 12), torch.float32)
    entries[1, 0], entries[0, 0, 17:], entries[0, 1], entries[1, 1, 1:] = [torch.nan] * 4
    assert check_decode(2, entries, [0, 1], [17, 1], 8).isfinite().all()


def test_one_operation_to_torch_compile() -> None:
    entries, q = slots((2, 2, 9, 10), torch.float32), torch.randn(2, 3, 10)
    loops, lengths = torch.tensor([0, 1]), torch.tensor([9, 4])

    def call(q: torch.Tensor) -> torch.Tensor:
        return latent_decode(2 * q, entries, loops, lengths, 8, backend="triton") + 1

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q), call(q))
