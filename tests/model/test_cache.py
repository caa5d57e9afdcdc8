"""The cache against a slow reference; its size, growth and errors."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_differs, assert_same, random_ids, small_config, small_model
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from open_mythos import ConfigError, KVCache, OpenMythos, cache_bytes
from open_mythos.model.cache import Columns
from open_mythos.model.context import Context
from open_mythos.model.exit_rules import Look, Memory

B, T = 3, 12


class SlowCache:
    """The rule of ``open_mythos.model.cache`` for a single row, one entry per (layer, token, loop).

    A token computed for s loops is seen, by deeper loops of others, with the entry of its last
    computed loop. With ``share_loops`` every loop sees the last computed entry.
    """

    def __init__(self, share_loops: bool = False) -> None:
        self.columns = Columns(0)
        self.share_loops = share_loops
        self.entries: dict[int, list[dict[int, Tensor]]] = {}

    @property
    def length(self) -> int:
        return self.columns.length

    def write(self, layer: int, loop: int, entry: Tensor, rows: Tensor | None = None) -> Tensor:
        tokens = self.entries.setdefault(layer, [])
        for i in range(entry.shape[1]):
            if len(tokens) == self.length + i:
                tokens.append({})
            tokens[self.length + i][loop] = entry[:, i]
        seen = []
        for by_loop in tokens[: self.length + entry.shape[1]]:
            last = max(by_loop)
            seen.append(by_loop[last if self.share_loops else min(loop, last)])
        return torch.stack(seen, dim=1)


@torch.no_grad()
def slow_row(
    model: OpenMythos, ids: Tensor, calls: list[tuple[int, int]], share_loops: bool = False
) -> Tensor:
    """Logits of one row through :class:`SlowCache`; ``calls`` are (tokens, loops)."""
    cache, logits, start = SlowCache(share_loops), [], 0
    for n_new, n_loops in calls:
        new = ids[None, start : start + n_new]
        ctx = Context.build(n_new, model.cfg.rotaries, ids.device, start_pos=start, cache=cache)
        e = model.embed(new, ctx)
        h = model.recurrent.initial_state(e, ctx)
        for t in range(n_loops):
            h = model.step(h, e, t, ctx)
        logits.append(model.logits(h, ctx)[0])
        cache.columns = ctx.columns
        start += n_new
    return torch.cat(logits)


def fast_rows(
    model: OpenMythos, ids: Tensor, calls: list[tuple[int, list[int]]], cache: KVCache
) -> Tensor:
    """Logits of the batch through the real cache; ``calls`` are (tokens, loops of each row)."""
    logits = []
    for n_new, n_loops in calls:
        new = ids[:, cache.length : cache.length + n_new]
        logits.append(model(new, n_loops, cache, cache.length))
    return torch.cat(logits, dim=1)


def assert_follows_the_rule(model: OpenMythos, calls: list[tuple[int, list[int]]]) -> None:
    ids = random_ids(len(calls[0][1]), sum(n_new for n_new, _ in calls))
    share = model.cfg.kv_share == "last"
    logits = fast_rows(model, ids, calls, KVCache(share_loops=share))
    for row in range(ids.shape[0]):
        own = [(n_new, n_loops[row]) for n_new, n_loops in calls]
        assert_same(logits[row], slow_row(model, ids[row], own, share))


SCHEDULES = {
    "shallow prefill, then deeper": [(5, [1, 1, 1]), (1, [4, 4, 4]), (2, [7, 7, 7])],
    "deep prefill, then shallow": [(5, [7, 7, 7]), (1, [2, 2, 2]), (4, [1, 1, 1])],
    "up and down": [(3, [2, 2, 2]), (3, [6, 6, 6]), (3, [1, 1, 1]), (3, [6, 6, 6])],
    "per row": [(4, [1, 5, 3]), (1, [6, 2, 3]), (1, [1, 1, 8]), (6, [4, 9, 2])],
    "one row runs ahead": [(2, [1, 1, 6]), (8, [1, 1, 1]), (2, [6, 1, 1])],
}


class TestRule:
    @pytest.mark.parametrize("calls", SCHEDULES.values(), ids=SCHEDULES)
    def test_depth_may_change_between_calls(self, model, calls):
        assert_follows_the_rule(model, calls)

    @hypothesis_settings(max_examples=12)
    @given(
        attn_type=st.sampled_from(["mla", "gqa"]),
        calls=st.lists(
            st.tuples(st.integers(1, 4), st.lists(st.integers(1, 7), min_size=2, max_size=2)),
            min_size=1,
            max_size=5,
        ),
    )
    def test_any_schedule(self, shared_model, attn_type, calls):
        assert_follows_the_rule(shared_model(attn_type), calls)

    @pytest.mark.parametrize("calls", SCHEDULES.values(), ids=SCHEDULES)
    def test_shared_loops_see_the_last_computed_one(self, attn_type, calls):
        assert_follows_the_rule(small_model(attn_type, kv_share="last"), calls)

    def test_the_oracle_equals_one_uncached_call(self, model):
        ids = random_ids(1, T)
        assert_same(slow_row(model, ids[0], [(1, 4)] * T), model(ids, 4)[0].detach())

    def test_the_rule_is_visible(self, model):
        """Control: deeper entries in place of the last computed ones change the logits."""
        ids = random_ids(1, T)
        shallow = slow_row(model, ids[0], [(6, 1), (6, 5)])
        deep = slow_row(model, ids[0], [(6, 5), (6, 5)])
        assert_differs(shallow[6:], deep[6:])
        assert_differs(slow_row(model, ids[0], [(6, 5), (6, 5)], share_loops=True)[6:], deep[6:])


class TestSharedLoops:
    def test_prefill_keeps_all_loops(self, attn_type):
        """In the first call every loop reads its own entries, so nothing is lost there."""
        model, exact = small_model(attn_type, kv_share="last"), small_model(attn_type)
        ids = random_ids(B, T)
        assert_same(model(ids, 5, {}), exact(ids, 5, {}))
        assert_same(model(ids, 5, {}), model(ids, 5).detach())

    def test_decoding_is_not_exact(self, attn_type):
        model = small_model(attn_type, kv_share="last")
        ids, kept = random_ids(B, T), {}
        model(ids[:, :6], 5, kept)
        assert_differs(model(ids[:, 6:], 5, kept, 6), model(ids, 5).detach()[:, 6:])

    def test_one_slot_per_layer(self, attn_type):
        model = small_model(attn_type, kv_share="last")
        cache = KVCache(share_loops=True)
        model(random_ids(B, T), 5, cache)
        assert cache.n_slots == 3

    @pytest.mark.parametrize("kv_share", ["none", "last"])
    def test_a_cache_of_the_other_kind_is_rejected(self, kv_share):
        model = small_model(kv_share=kv_share)
        with pytest.raises(ConfigError, match="share_loops"):
            model(random_ids(1, 2), 1, KVCache(share_loops=kv_share == "none"))


class TestBytes:
    @pytest.mark.parametrize("kv_share", ["none", "last"])
    @pytest.mark.parametrize("n_loops", [1, 5])
    def test_bytes_are_the_formula(self, attn_type, kv_share, n_loops):
        model = small_model(attn_type, kv_share=kv_share, recurrent_layers=2)
        cache = KVCache(capacity=T, share_loops=kv_share == "last")
        model(random_ids(B, T), n_loops, cache)
        assert cache.n_slots == model.cfg.cache_slots(n_loops)
        assert cache.nbytes == cache_bytes(model.cfg, n_loops, T, B, element_size=4)

    def test_width_of_an_entry(self):
        assert small_config("mla").cache_width == 20 + 4
        assert small_config("gqa").cache_width == 2 * 2 * 8

    def test_half_precision_halves_them(self, attn_type):
        model = small_model(attn_type).bfloat16()
        cache = KVCache(capacity=T)
        model(random_ids(B, T), 4, cache)
        assert cache.nbytes == cache_bytes(model.cfg, 4, T, B, element_size=2)

    def test_capacity_doubles(self, model):
        ids, cache, capacities = random_ids(1, 40), KVCache(), set()
        for i in range(40):
            model(ids[:, i : i + 1], 2, cache, i)
            assert cache.nbytes % cache_bytes(model.cfg, 2, 1, element_size=4) == 0
            capacities.add(cache.nbytes // cache_bytes(model.cfg, 2, 1, element_size=4))
        assert capacities == {1, 2, 4, 8, 16, 32, 64}

    def test_all_slots_have_one_capacity_whatever_the_depths(self, model):
        ids, cache = random_ids(1, 20), KVCache()
        for n_loops, end in ((6, 3), (1, 7), (2, 15), (8, 20)):
            model(ids[:, cache.length : end], n_loops, cache, cache.length)
            assert len({slot.shape[1] for slot in cache._slots.values()}) == 1


class TestTruncate:
    def test_truncate_and_rerun_equals_one_run(self, model):
        ids, other = random_ids(B, T), random_ids(B, T, seed=5)
        cache, fresh = KVCache(), KVCache()
        model(ids[:, :5], 4, cache)
        model(other[:, 5:], [6, 1, 3], cache, 5)
        cache.truncate(5)
        assert cache.length == 5
        model(ids[:, :5], 4, fresh)
        assert_same(model(ids[:, 5:], 6, cache, 5), model(ids[:, 5:], 6, fresh, 5))

    def test_masks_and_documents_are_truncated(self, model):
        """What is forgotten leaves no mark, and what is kept is still masked."""
        ids = random_ids(1, T)
        mask, documents = torch.ones(1, T, dtype=torch.bool), torch.zeros(1, T, dtype=torch.long)
        mask[0, 2] = mask[0, 8:10] = False
        documents[0, 9:] = 1
        cache = KVCache()
        model(ids, 4, cache, attention_mask=mask, document_ids=documents)
        cache.truncate(6)
        again = model(ids[:, 6:], 4, cache, 6, document_ids=documents[:, :6])
        kept = ids[:, [0, 1, 3, 4, 5, *range(6, T)]]
        assert_same(again, model(kept, 4).detach()[:, 5:])

    def test_to_nothing_takes_another_batch(self, model):
        cache = KVCache()
        model(random_ids(3, 4), 2, cache)
        cache.truncate(0)
        ids = random_ids(2, 5)
        assert_same(model(ids, 3, cache), model(ids, 3).detach())

    @pytest.mark.parametrize("length", [-1, 5, 2.5, "3"])
    def test_out_of_range(self, model, length):
        cache = KVCache()
        model(random_ids(1, 4), 1, cache)
        with pytest.raises(ConfigError, match=r"0 \.\. 4"):
            cache.truncate(length)


class TestCalls:
    def test_plain_dict(self, model):
        """An empty dict handed back at every step keeps the cache, as in older scripts."""
        ids, kept = random_ids(B, T), {}
        logits = [model(ids[:, i : i + 1], 4, kept, i) for i in range(T)]
        assert_same(torch.cat(logits, 1), model(ids, 4).detach())

    def test_no_graph_is_kept(self, model):
        logits = model(random_ids(1, 3), 2, KVCache())
        assert not logits.requires_grad
        assert model(random_ids(1, 3), 2).requires_grad

    @pytest.mark.parametrize("n_loops", [3, [2, 6]])
    @pytest.mark.parametrize("held", [0, 4])
    def test_a_failed_call_leaves_the_cache_usable(self, model, held, n_loops):
        ids, cache = random_ids(2, T), KVCache()
        if held:
            model(ids[:, :held], 5, cache)

        def fail(look: Look, memory: Memory | None) -> tuple[Tensor, Memory]:
            if look.t == 1:
                raise RuntimeError("in the middle of loop 1")
            return torch.zeros(look.after_BTD.shape[:2], dtype=torch.bool), ()

        with pytest.raises(RuntimeError, match="in the middle"):
            model(random_ids(2, 7, seed=9), n_loops, cache, held, exit_rule=fail)
        assert cache.length == held
        logits = model(ids[:, held:], [5, 3], cache, held)
        clean = KVCache()
        if held:
            model(ids[:, :held], 5, clean)
        assert_same(logits, model(ids[:, held:], [5, 3], clean, held))

    def test_a_failed_first_call_may_be_repeated_with_another_batch(self, model):
        cache = KVCache()

        def fail(look: Look, memory: Memory | None) -> tuple[Tensor, Memory]:
            raise MemoryError

        with pytest.raises(MemoryError):
            model(random_ids(4, 7), 3, cache, exit_rule=fail)
        ids = random_ids(2, T)
        assert_same(model(ids, 3, cache), model(ids, 3).detach())

    def test_another_batch_is_rejected(self, model):
        cache = KVCache()
        model(random_ids(2, 3), 1, cache)
        with pytest.raises(ConfigError, match="another batch"):
            model(random_ids(1, 3), 1, cache, 3)

    @pytest.mark.parametrize("cache", [[], 3, "cache", {"somebody": "else"}], ids=repr)
    def test_not_a_cache(self, model, cache):
        with pytest.raises(ConfigError, match="not a cache"):
            model(random_ids(1, 3), 1, cache)

    @pytest.mark.parametrize("first", [True, False])
    def test_documents_at_some_calls_only_are_rejected(self, model, first):
        """Silently continuing document 0 or a fresh one would both be wrong for some caller."""
        cache, documents = KVCache(), torch.zeros(1, 3, dtype=torch.long)
        model(random_ids(1, 3), 1, cache, document_ids=documents if first else None)
        with pytest.raises(ConfigError, match="at every call"):
            model(random_ids(1, 3), 1, cache, 3, document_ids=None if first else documents)


@pytest.mark.parametrize(
    "other",
    [
        lambda: small_model(prelude_layers=2),
        lambda: small_model(kv_lora_rank=8),
        lambda: small_model("gqa"),
        lambda: small_model().bfloat16(),
    ],
)
def test_a_cache_of_another_model_is_refused(other):
    cache, ids = KVCache(), random_ids(2, 6)
    other()(ids[:, :4], 2, cache)
    with pytest.raises(ConfigError, match="another model"):
        small_model()(ids[:, 4:], 2, cache, 4)
    cache.truncate(0)
    small_model()(ids, 2, cache)
