"""Pages are free, held or cached, each once; prefixes are found by everything that decides them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_mythos.errors import ConfigError, InternalError
from open_mythos.inference.pages import Layout, Pages, unit_keys
from open_mythos.variants import variant


def test_levels_and_pages():
    layout = Layout(prelude=2, recurrent=3, coda=1)
    assert layout.levels(4) == 2 + 1 + 4 * 3
    assert Layout(2, 3, 1, share_loops=True).levels(4) == 2 + 1 + 3
    assert Layout(12).levels(0) == 12
    assert [layout.rows(n) for n in (1, 63, 64, 65, 128)] == [1, 1, 1, 2, 2]
    assert layout.pages(4, 65) == 15 * 2


@pytest.mark.parametrize("page", [0, 48])
def test_a_page_is_a_power_of_two(page):
    with pytest.raises(ConfigError):
        Layout(1, page=page)


def test_bytes_of_a_variant():
    """16 loops in bfloat16: 11.25 KiB a token, and 2.9 GB for 64 requests of 4,096 tokens."""
    cfg = variant("mythos_1b")
    layout = Layout(cfg.prelude_layers, cfg.recurrent_layers, cfg.coda_layers)
    width = cfg.kv_lora_rank + cfg.qk_rope_head_dim
    size = layout.pages(16, 4096) * layout.page * width * 2
    assert size == 4096 * 11.25 * 1024
    assert 64 * size == pytest.approx(2.9e9, rel=0.05)


def test_page_0_is_never_given_out():
    pages = Pages(5)
    assert sorted(pages.take(5)) == [1, 2, 3, 4, 5]
    with pytest.raises(InternalError):
        pages.take(1)


def entered(pages: Pages, key: bytes, n: int = 2) -> list[int]:
    """Pages of a unit that was computed, entered and released."""
    own = pages.take(n)
    pages.enter(key, own)
    pages.release(own)
    return own


def test_cached_units_are_found_and_shared():
    pages = Pages(6)
    own = entered(pages, b"a")
    assert (pages.free, pages.cached, pages.held) == (4, 2, 0)
    assert pages.prefix([b"a", b"b"]) == 1
    assert pages.prefix([b"b", b"a"]) == 0
    assert pages.hold(b"a") == pages.hold(b"a") == tuple(own)
    assert (pages.free, pages.cached, pages.held) == (4, 0, 2)
    pages.check([own, own])
    pages.release(own)
    pages.check([own])
    assert pages.cached == 0, "one sequence holds it still"
    pages.release(own)
    assert pages.cached == 2


def test_the_unit_unused_longest_is_given_up_first():
    pages = Pages(6)
    for key in (b"a", b"b", b"c"):
        entered(pages, key)
    pages.release(pages.hold(b"a"))
    pages.take(2)
    assert [pages.prefix([key]) for key in (b"a", b"b", b"c")] == [1, 0, 1]
    pages.take(2)
    assert [pages.prefix([key]) for key in (b"a", b"c")] == [1, 0]


def test_a_held_unit_is_never_given_up():
    pages = Pages(4)
    entered(pages, b"a")
    own = pages.hold(b"a")
    assert pages.available == 2
    assert set(pages.take(2)).isdisjoint(own)
    assert pages.available == 0


def test_a_known_unit_is_not_entered_twice():
    pages = Pages(4)
    first = entered(pages, b"a")
    second = pages.take(2)
    pages.enter(b"a", second)
    pages.release(second)
    assert (pages.free, pages.cached) == (2, 2)
    assert pages.hold(b"a") == tuple(first)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=40))
def test_counts_add_up(steps):
    pages, holders = Pages(12), []
    for action, n in steps:
        key = bytes([n])
        if action == 0 and pages.available >= 2:
            holders.append(pages.take(2))
        elif action == 1 and holders:
            pages.release(holders.pop(n % len(holders)))
        elif action == 2 and holders:
            own = holders[n % len(holders)]
            if own[0] not in pages._key_of:
                pages.enter(key, own)
        elif action == 3 and pages.prefix([key]):
            holders.append(list(pages.hold(key)))
        assert pages.free + pages.cached + pages.held == 12
        pages.check(holders)


@pytest.mark.parametrize(
    ("holders", "what"),
    [
        ([[1, 2]], "counted"),
        ([[1, 2, 3], [3]], "counted"),
        ([[1, 2, 3, 4]], "counted"),
    ],
)
def test_wrong_books_are_found(holders, what):
    pages = Pages(5)
    pages._free = [4, 5]
    pages._holders[1:4] = [1, 1, 1]
    pages.check([[1, 2, 3]])
    with pytest.raises(InternalError, match=what):
        pages.check(holders)


def test_a_private_page_of_two_is_found():
    pages = Pages(5)
    own = pages.take(2)
    pages._holders[own[0]] = 2
    with pytest.raises(InternalError, match="shared"):
        pages.check([own, own[:1]])
    pages.enter(b"a", own)
    pages._holders[own[1]] = 2
    pages.check([own, own])


def test_a_lost_page_is_found():
    pages = Pages(5)
    pages._free.pop()
    with pytest.raises(InternalError, match="lost"):
        pages.check([])


FACTS = ("weights", "fp32", True, 4)
PROMPT = tuple(range(100, 132))


def test_keys_are_a_chain():
    """A key says everything about the ids before its end, and nothing about those after it."""
    keys = unit_keys(FACTS, PROMPT, 8)
    assert len(set(keys)) == 4
    assert len(unit_keys(FACTS, PROMPT[:31], 8)) == 3
    assert unit_keys(FACTS, (*PROMPT, 1), 8) == keys
    for i in range(32):
        other = list(PROMPT)
        other[i] += 1
        changed = unit_keys(FACTS, other, 8)
        same = [a == b for a, b in zip(keys, changed, strict=True)]
        assert same == [k < i // 8 for k in range(4)]


@pytest.mark.parametrize(
    "facts", [("other", *FACTS[1:]), (*FACTS[:3], 5), (*FACTS, ""), FACTS[:3], ("weights4",)]
)
def test_keys_depend_on_the_facts(facts):
    assert not set(unit_keys(facts, PROMPT, 8)) & set(unit_keys(FACTS, PROMPT, 8))
