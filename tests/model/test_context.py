"""Positions and masks against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from open_mythos import KVCache
from open_mythos.config import Rotary
from open_mythos.model.active import Active
from open_mythos.model.context import Context
from open_mythos.ops.attention.visibility import Visibility
from open_mythos.ops.rope import rope_table

CPU = torch.device("cpu")


def build(n_new: int, **arguments: object) -> Context:
    return Context.build(n_new, [Rotary(4, 1e4)], CPU, **arguments)


def slow(valid: list[bool], document: list[int]) -> tuple[list[int], list[list[bool]]]:
    """Compute positions and mask, one pair of tokens at a time."""
    run, runs = 0, []
    for i, number in enumerate(document):
        run += i > 0 and number != document[i - 1]
        runs.append(run)
    n = len(valid)
    positions = [sum(valid[j] and runs[j] == runs[i] for j in range(i)) for i in range(n)]
    sees = [
        [i == j or (j < i and valid[j] and runs[j] == runs[i]) for j in range(n)] for i in range(n)
    ]
    return positions, sees


def visible(ctx: Context, total: int) -> Tensor:
    """(B or 1, T, S) what the context says, whichever way it says it."""
    if isinstance(ctx.mask, Visibility):
        return ctx.mask.rows()[:, 0]
    if ctx.mask is not None:
        return ctx.mask[:, 0]
    n_new = ctx.positions.shape[-1]
    if ctx.causal:
        return torch.ones(1, n_new, n_new, dtype=torch.bool).tril()
    assert n_new == 1
    return torch.ones(1, 1, total, dtype=torch.bool)


rows = st.lists(st.tuples(st.booleans(), st.integers(0, 2)), min_size=1, max_size=9)


@hypothesis_settings(max_examples=150)
@given(row=rows, cut=st.integers(0, 8))
def test_masks_and_documents_in_one_or_two_calls(row, cut):
    valid, document = [list(part) for part in zip(*row, strict=True)]
    positions, sees = slow(valid, document)
    cache, start, cut = KVCache(), 0, min(cut, len(row) - 1)
    for end in sorted({cut, len(row)} - {0}):
        ctx = build(
            end - start,
            start_pos=start,
            cache=cache,
            valid_BT=torch.tensor([valid[start:end]]),
            document_BT=torch.tensor([document[start:end]]),
        )
        assert ctx.positions.tolist() == [positions[start:end]]
        expected = [line[:end] for line in sees[start:end]]
        assert visible(ctx, end).tolist() == [expected]
        cache.commit(ctx.columns)
        start = end


@pytest.mark.parametrize("cuts", [[5], [1, 5], [2, 3, 5], [4, 5]])
def test_plain_calls(cuts):
    cache, start = KVCache(), 0
    for end in cuts:
        ctx = build(end - start, start_pos=start, cache=cache)
        assert ctx.positions.tolist() == list(range(start, end))
        expected = torch.ones(5, 5, dtype=torch.bool).tril()[start:end, :end]
        assert torch.equal(visible(ctx, end)[0], expected)
        cache.commit(ctx.columns)
        start = end


def test_plain_calls_need_no_mask():
    """The attention kernels are fastest without one."""
    cache = KVCache()
    whole = build(4, cache=cache)
    assert whole.mask is None
    assert whole.causal
    cache.commit(whole.columns)
    single = build(1, start_pos=4, cache=cache)
    assert single.mask is None
    assert not single.causal


def test_start_without_a_cache_moves_positions():
    assert build(3, start_pos=10).positions.tolist() == [10, 11, 12]
    mask = torch.tensor([[False, True, True]])
    assert build(3, start_pos=10, valid_BT=mask).positions.tolist() == [[10, 10, 11]]


def test_rope_is_that_of_the_positions():
    documents = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]])
    ctx = build(4, document_BT=documents)
    assert torch.equal(ctx.rope, rope_table(ctx.positions, 4, 1e4))
    assert ctx.rope.shape == (2, 2, 4, 2)


def test_select_keeps_what_belongs_to_a_row():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 1]]).bool()
    ctx = build(3, valid_BT=mask, keys_B=torch.tensor([4, 5, 6, 7]))
    some = ctx.at(Active(torch.tensor([2, 3])))
    assert some.active.rows.tolist() == [2, 3]
    assert some.keys_B.tolist() == [6, 7]
    for name in ("positions", "valid_BT"):
        assert torch.equal(getattr(some, name), getattr(ctx, name)[2:])
    assert torch.equal(some.mask.rows(), ctx.mask.rows()[2:])
    assert torch.equal(some.rope, ctx.rope[:, 2:])


def test_select_leaves_alone_what_all_rows_share():
    cache = KVCache()
    cache.commit(build(2, cache=cache).columns)
    ctx = build(2, start_pos=2, cache=cache)
    some = ctx.at(Active(torch.tensor([1])))
    assert torch.equal(some.mask.rows(), ctx.mask.rows())
    assert torch.equal(some.positions, ctx.positions)
