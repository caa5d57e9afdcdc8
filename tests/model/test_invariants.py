"""Two ways to compute the same thing give the same thing; each with what would break it.

Everything is compared in float32: the largest difference of logits may be 1e-4 of their standard
deviation. The models are randomised, since a fresh one has its branches at zero.
"""

from __future__ import annotations

import pytest
import torch
from helpers import ATTENTION_TYPES, assert_differs, assert_same, random_ids, small_model
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from open_mythos import KVCache, OpenMythos

DEPTHS = (1, 4, 16, [1, 16, 6])
"""The trained depth is 4, so 16 lies far beyond it; the last is one depth per sequence."""
depths = pytest.mark.parametrize("n_loops", DEPTHS, ids=str)

B, T = 3, 13


@torch.no_grad()
def full(model: OpenMythos, ids: Tensor, n_loops: int | list[int], **arguments: object) -> Tensor:
    """Logits of one call without a cache."""
    return model(ids, n_loops, **arguments)


def cached(
    model: OpenMythos, ids: Tensor, n_loops: int | list[int], cuts: list[int], **arguments: Tensor
) -> Tensor:
    """Logits of calls that end at each of ``cuts``, on one cache."""
    cache, logits = KVCache(), []
    for end in [*cuts, ids.shape[1]]:
        now = slice(cache.length, end)
        part = {name: value[:, now] for name, value in arguments.items()}
        logits.append(model(ids[:, now], n_loops, cache, cache.length, **part))
    return torch.cat(logits, 1)


class TestCache:
    @depths
    def test_token_by_token_equals_one_call(self, model, n_loops):
        ids = random_ids(B, T)
        assert_same(cached(model, ids, n_loops, list(range(1, T))), full(model, ids, n_loops))

    @hypothesis_settings(max_examples=15)
    @given(
        attn_type=st.sampled_from(ATTENTION_TYPES),
        cuts=st.sets(st.integers(1, T - 1)),
        n_loops=st.sampled_from(DEPTHS),
    )
    def test_any_chunking_equals_one_call(self, shared_model, attn_type, cuts, n_loops):
        model, ids = shared_model(attn_type), random_ids(B, T)
        assert_same(cached(model, ids, n_loops, sorted(cuts)), full(model, ids, n_loops))

    @depths
    def test_more_than_one_block_per_loop(self, attn_type, n_loops):
        model = small_model(attn_type, recurrent_layers=2, prelude_layers=0, coda_layers=2)
        ids = random_ids(B, T)
        assert_same(cached(model, ids, n_loops, [4, 5]), full(model, ids, n_loops))

    def test_depth_64(self, model):
        ids = random_ids(B, 6)
        assert_same(cached(model, ids, 64, [2, 5]), full(model, ids, 64))

    def test_the_cache_is_read(self, model):
        """Control: the same tokens on another history give other logits."""
        ids, other = random_ids(B, T), random_ids(B, T, seed=1)
        other[:, 6:] = ids[:, 6:]
        assert_differs(cached(model, other, 4, [6])[:, 6:], cached(model, ids, 4, [6])[:, 6:])

    def test_every_loop_has_its_own_slot(self, model):
        """Control: sharing one loop's entries between all loops changes the logits."""
        ids = random_ids(B, T)
        cache, right = KVCache(), cached(model, ids, 4, [6])[:, 6:]
        model(ids[:, :6], 4, cache)
        for (layer, loop), slot in cache._slots.items():
            slot.copy_(cache._slots[layer, 3 if (layer, 3) in cache._slots else loop])
        assert_differs(model(ids[:, 6:], 4, cache, 6), right)

    def test_forward_depends_on_every_loop(self, model):
        """Control: neighbouring depths differ, so an off-by-one in depth cannot pass."""
        ids = random_ids(B, T)
        for n_loops in (1, 3, 4, 15):
            assert_differs(full(model, ids, n_loops), full(model, ids, n_loops + 1))


class TestPadding:
    LENGTHS = (13, 5, 1)

    def masked(self, side: str) -> tuple[Tensor, Tensor]:
        ids, mask = random_ids(B, T, seed=2), torch.zeros(B, T, dtype=torch.bool)
        for row, length in enumerate(self.LENGTHS):
            mask[row, T - length :] = side == "left"
            mask[row, :length] |= side == "right"
        return ids, mask

    @depths
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padded_equals_alone(self, model, n_loops, side):
        ids, mask = self.masked(side)
        logits = full(model, ids, n_loops, attention_mask=mask)
        for row in range(B):
            depth = n_loops if isinstance(n_loops, int) else n_loops[row]
            assert_same(logits[row, mask[row]], full(model, ids[row, mask[row]][None], depth)[0])

    @depths
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padded_and_cached_equals_alone(self, model, n_loops, side):
        ids, mask = self.masked(side)
        logits = cached(model, ids, n_loops, [3, 7, 8], attention_mask=mask)
        for row in range(B):
            depth = n_loops if isinstance(n_loops, int) else n_loops[row]
            assert_same(logits[row, mask[row]], full(model, ids[row, mask[row]][None], depth)[0])

    def test_mask_may_begin_later_than_the_cache(self, model):
        ids, mask = random_ids(1, T), torch.ones(1, T - 4, dtype=torch.long)
        mask[0, 2] = 0
        cache = KVCache()
        model(ids[:, :4], 4, cache)
        logits = model(ids[:, 4:], 4, cache, 4, attention_mask=mask)
        kept = torch.cat((torch.ones(1, 4, dtype=torch.bool), mask.bool()), 1)
        assert_same(logits[:, mask[0] == 1], full(model, ids[kept][None], 4)[:, 4:])

    def test_padding_must_be_declared(self, model):
        """Control: without the mask the padding is seen."""
        ids, mask = self.masked("left")
        logits = full(model, ids, 4)[1, mask[1]]
        assert_differs(logits, full(model, ids[1, mask[1]][None], 4)[0])

    def test_nothing_but_padding_is_finite(self, model):
        mask = torch.zeros(B, T, dtype=torch.bool)
        assert full(model, random_ids(B, T), 4, attention_mask=mask).isfinite().all()


class TestDocuments:
    DOCUMENTS = torch.tensor([[0] * 5 + [1] * 8, [3] * 1 + [9] * 11 + [4] * 1, [7] * 13])

    def separate(self, model: OpenMythos, ids: Tensor, n_loops: int | list[int]) -> Tensor:
        rows = []
        for row in range(B):
            depth = n_loops if isinstance(n_loops, int) else n_loops[row]
            spans = self.DOCUMENTS[row].unique_consecutive(return_counts=True)[1].tolist()
            rows.append(torch.cat([full(model, x[None], depth)[0] for x in ids[row].split(spans)]))
        return torch.stack(rows)

    @depths
    def test_packed_equals_separate(self, model, n_loops):
        ids = random_ids(B, T)
        packed = full(model, ids, n_loops, document_ids=self.DOCUMENTS)
        assert_same(packed, self.separate(model, ids, n_loops))

    @depths
    def test_packed_in_chunks_equals_separate(self, model, n_loops):
        ids = random_ids(B, T)
        packed = cached(model, ids, n_loops, [1, 4, 9], document_ids=self.DOCUMENTS)
        assert_same(packed, self.separate(model, ids, n_loops))

    def test_a_number_that_returns_is_a_new_document(self, model):
        ids = random_ids(1, 9)
        documents = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0, 0]])
        packed = full(model, ids, 4, document_ids=documents)
        parts = [full(model, part, 4) for part in ids.split([3, 2, 4], 1)]
        assert_same(packed, torch.cat(parts, 1))

    def test_packed_with_padding_between(self, model):
        ids = random_ids(1, 9)
        documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
        mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 0]])
        logits = full(model, ids, 4, document_ids=documents, attention_mask=mask)
        assert_same(logits[:, :3], full(model, ids[:, :3], 4))
        assert_same(logits[:, 5:8], full(model, ids[:, 5:8], 4))

    def test_boundaries_matter(self, model):
        """Control: without document numbers the second document sees the first."""
        ids = random_ids(B, T)
        assert_differs(full(model, ids, 4), self.separate(model, ids, 4))


class TestBatch:
    @depths
    def test_batch_equals_alone(self, model, n_loops):
        ids = random_ids(B, T)
        logits = full(model, ids, n_loops)
        for row in range(B):
            depth = n_loops if isinstance(n_loops, int) else n_loops[row]
            assert_same(logits[row : row + 1], full(model, ids[row : row + 1], depth))

    @pytest.mark.parametrize("other", [1, 2, 5, 9])
    def test_depth_of_a_neighbor_changes_nothing(self, model, other):
        """Compared with a run of the same shapes, whose rounding is the same."""
        ids = random_ids(2, T)
        both = full(model, ids, [5, 5])[0]
        assert_same(full(model, ids, [5, other])[0], both, tolerance=1e-5)

    def test_depth_of_a_cached_neighbor_changes_nothing(self, model):
        ids = random_ids(2, T)
        runs = []
        for other in (1, 3, 8):
            cache = KVCache()
            model(ids[:, :7], [4, other], cache)
            runs.append(model(ids[:, 7:], [4, 9 - other], cache, 7)[0])
        assert_same(runs[1], runs[0], tolerance=1e-5)
        assert_same(runs[2], runs[0], tolerance=1e-5)


class TestParts:
    @torch.no_grad()
    def by_hand(self, model: OpenMythos, ids: Tensor, n_loops: int, **arguments: object) -> Tensor:
        ctx = model.context(ids, **arguments)
        e = model.embed(ids, ctx)
        h = model.recurrent.initial_state(e, ctx)
        for t in range(n_loops):
            h = model.step(h, e, t, ctx)
        return model.logits(h, ctx)

    @pytest.mark.parametrize("n_loops", [1, 4, 16])
    @pytest.mark.parametrize("initial_state", ["zero", "normal", "prelude"])
    def test_embed_step_logits_is_forward(self, attn_type, n_loops, initial_state):
        model = small_model(attn_type, initial_state=initial_state, loop_embedding=True)
        ids = random_ids(B, T)
        assert_same(self.by_hand(model, ids, n_loops), full(model, ids, n_loops))

    def test_with_mask_and_documents(self, model):
        ids = random_ids(B, T)
        arguments = {"document_ids": TestDocuments.DOCUMENTS}
        assert_same(self.by_hand(model, ids, 4, **arguments), full(model, ids, 4, **arguments))

    @torch.no_grad()
    def test_without_a_context(self, model):
        """Every part of the seam builds a plain causal context of its own when it is given none."""
        ids = random_ids(B, T)
        e = model.embed(ids)
        h = torch.zeros_like(e)
        for t in range(4):
            h = model.step(h, e, t)
        assert_same(model.logits(h), full(model, ids, 4))

    @torch.no_grad()
    def test_state_without_the_input_differs(self, model):
        """Control: the encoded input is injected at every loop, not only at the first."""
        ids = random_ids(B, T)
        e = model.embed(ids)
        h = model.step(torch.zeros_like(e), e, 0)
        assert_differs(model.step(h, torch.zeros_like(e), 1), model.step(h, e, 1))


class TestCausality:
    @depths
    def test_a_token_changes_nothing_before_it(self, model, n_loops):
        ids = random_ids(B, T)
        changed = ids.clone()
        changed[:, 6] = (ids[:, 6] + 1) % 61
        before, after = full(model, ids, n_loops), full(model, changed, n_loops)
        assert_same(after[:, :6], before[:, :6], tolerance=1e-5)
        for row in range(B):
            assert_differs(after[row, 6:], before[row, 6:])

    def test_only_relative_positions_matter(self, model):
        ids = random_ids(B, T)
        assert_same(full(model, ids, 4, start_pos=40), full(model, ids, 4))

    def test_order_matters(self, model):
        ids = random_ids(B, T)
        swapped = ids.clone()
        swapped[:, [2, 3]] = ids[:, [3, 2]]
        assert_differs(full(model, swapped, 4)[:, 6:], full(model, ids, 4)[:, 6:])
