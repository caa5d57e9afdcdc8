"""Attention over pages: every form against the plain one, and what a row may depend on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from open_mythos.errors import ConfigError
from open_mythos.ops.attention import paged
from open_mythos.ops.attention.attend import attend
from open_mythos.ops.attention.latent import latent_attend
from open_mythos.ops.attention.paged import PagedHistory, kv_paged, latent_paged

NAN = float("nan")
DTYPES = [torch.float32, torch.bfloat16]
KINDS = {  # elements of an entry, query heads, width of a query, rank or key heads
    "latent": (26, 5, 26, 20),
    "keys and values": (48, 6, 12, 2),
}
kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def call(kind: str, q: Tensor, history: PagedHistory, backend: str = "auto") -> Tensor:
    op = latent_paged if kind == "latent" else kv_paged
    return op(q, history, KINDS[kind][3], backend)


def case(
    kind: str, lengths: list[int], dtype: torch.dtype = torch.float32, page: int = 8
) -> tuple[Tensor, PagedHistory]:
    """Queries, and a history whose pages lie in random order; lengths are sorted."""
    width, heads, key_width, _ = KINDS[kind]
    counts = [-(-length // page) for length in lengths]
    order = (torch.randperm(sum(counts)) + 1).split(counts)
    table = torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True)
    pool = torch.randn(sum(counts) + 1, page, width).to(dtype)
    q = torch.randn(len(lengths), heads, key_width).mul(key_width**-0.25).to(dtype)
    return q, PagedHistory(pool, table, torch.tensor(lengths), runs(counts))


def runs(counts: list[int]) -> tuple[tuple[int, int, int], ...]:
    ends = {count: row + 1 for row, count in enumerate(counts)}
    return tuple((counts.index(count), end, count) for count, end in ends.items())


def some(history: PagedHistory, first: int, end: int, pages: int | None) -> PagedHistory:
    """Rows ``first`` .. ``end``, over ``pages`` pages; None for the form of constant shape."""
    table, lengths = history.table_RM[first:end], history.lengths_R[first:end]
    groups = None if pages is None else ((0, end - first, pages),)
    return PagedHistory(history.pool_NPW, table, lengths, groups)


def soil(history: PagedHistory, value: float = NAN) -> None:
    """Overwrite everything that no row sees, page 0 included."""
    seen = torch.zeros(history.pool_NPW.shape[:2], dtype=torch.bool)
    for table, length in zip(history.table_RM, history.lengths_R, strict=True):
        position = torch.arange(int(length))
        seen[table[position // history.page], position % history.page] = True
    history.pool_NPW[~seen] = value


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@kinds
def test_the_reference_is_attention_over_contiguous_entries(kind):
    q, history = case(kind, [1, 8, 13, 17])
    out = call(kind, q, history, "reference")
    for row, length in enumerate(history.lengths_R.tolist()):
        entry = history.pool_NPW[history.table_RM[row]].flatten(0, 1)[None, :length]
        if kind == "latent":
            expected = latent_attend(q[row, None, None], entry, rank=20, backend="reference")
        else:
            k, v = entry.unflatten(-1, (2, 2, 12)).unbind(2)
            expected = attend(q[row, None, None], k, v, backend="reference")
        torch.testing.assert_close(out[row], expected[0, 0])


@dtypes
@kinds
@pytest.mark.parametrize("backend", ["groups", "masked"])
@pytest.mark.parametrize("lengths", [[1], [8, 8], [3, 9, 16, 17, 31], [1, 2, 40]], ids=str)
def test_equals_the_reference(lengths, backend, kind, dtype):
    q, history = case(kind, lengths, dtype)
    out = call(kind, q, history, backend)
    expected = call(kind, q, history, "reference")
    assert (out.shape, out.dtype) == (expected.shape, dtype)
    error = (out.double() - expected.double()).norm() / expected.double().norm()
    assert error < (1e-6 if dtype == torch.float32 else 8e-3)


@dtypes
@kinds
@pytest.mark.parametrize("backend", ["groups", "masked", "reference"])
def test_what_no_row_sees_may_be_anything(backend, kind, dtype):
    q, history = case(kind, [1, 9, 16, 17, 30], dtype)
    before = call(kind, q, history, backend)
    for value in (NAN, float("inf"), 7.0):
        soil(history, value)
        assert torch.equal(call(kind, q, history, backend), before)


@dtypes
@kinds
@pytest.mark.usefixtures("_threads")
def test_bits_of_a_row_do_not_depend_on_the_other_rows(kind, dtype):
    for pages, page in [*((pages, 8) for pages in range(1, 9)), (3, 64), (9, 64)]:
        for rows in (1, 2, 7, 16):
            first = (pages - 1) * page + 1
            q, history = case(kind, [first + row % page for row in range(rows)], dtype, page)
            whole = call(kind, q, history)
            for row in {0, rows // 2, rows - 1}:
                alone = call(kind, q[row : row + 1], some(history, row, row + 1, pages))
                assert torch.equal(alone[0], whole[row]), (pages, rows, row)
            half = call(kind, q[rows // 2 :], some(history, rows // 2, rows, pages))
            assert torch.equal(half, whole[rows // 2 :]), (pages, rows)


@dtypes
@kinds
def test_bits_depend_on_a_width_that_is_not_the_rows_own(kind, dtype):
    """Control: all rows over the pages of the longest."""

    def same() -> bool:
        q, history = case(kind, list(range(3, 99, 6)), dtype)
        padded = call(kind, q, some(history, 0, len(q), None))
        return torch.equal(padded, call(kind, q, history))

    assert not all(same() for _ in range(20))


@kinds
def test_large_runs_go_in_pieces_of_the_same_bits(kind, monkeypatch):
    q, history = case(kind, [3, 9, 12, 13, 15])
    whole = call(kind, q, history)
    for limit in (1, 2 * 16 * 48 * 4):
        monkeypatch.setattr(paged, "GATHER_BYTES", limit)
        assert torch.equal(call(kind, q, history), whole)


@kinds
def test_the_form_of_constant_shape_reads_nothing_on_the_host(kind):
    """Lengths and pages may change under one captured or compiled step."""
    q, history = case(kind, [3, 9, 30])
    history = some(history, 0, 3, None)
    step = torch.compile(lambda: call(kind, q, history), fullgraph=True, backend="eager")
    step()
    history.lengths_R.copy_(torch.tensor([8, 4, 25]))
    history.table_RM[2] = history.table_RM[2].flip(0)
    torch.testing.assert_close(step(), call(kind, q, history, "reference"))


def test_groups_need_page_counts_and_names_are_known():
    q, history = case("latent", [4])
    with pytest.raises(AssertionError, match="on the host"):
        call("latent", q, some(history, 0, 1, None), "groups")
    with pytest.raises(ConfigError, match="groups, masked"):
        call("latent", q, history, "paged")
