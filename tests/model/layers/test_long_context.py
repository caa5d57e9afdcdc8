"""Memory of attention is linear in the context, up to a million positions.

What is counted are the allocations that PyTorch's profiler records, those inside kernels included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from helpers import assert_differs, assert_same, random_ids, randomise, small_config, small_model
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from open_mythos import GQAttention, KVCache, MLAttention
from open_mythos.model.active import Active
from open_mythos.model.context import Context
from open_mythos.model.depth import Depth
from open_mythos.model.layers import mla
from open_mythos.model.layers.block import ATTENTION
from open_mythos.ops.attention import pieces as attention_pieces
from open_mythos.ops.attention.visibility import Visibility

CPU = torch.device("cpu")
KINDS = ("plain", "padded", "packed")
SIZES = (1024, 2048, 4096)
CHUNK = 256
PLACE = 999_872
"""Where 128 tokens end a million positions."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Kernels take scratch memory for every thread they have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def peak(call: Callable[[], object]) -> int:
    """Most bytes that ``call`` had allocated at a time beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    found = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    live = most = 0
    for _, count in sorted(found, key=lambda pair: pair[0]):
        live += count
        most = max(most, live)
    return most


def about(kind: str, n: int, batch: int = 1) -> dict[str, Tensor]:
    """What is said of ``n`` tokens: left padding, or two documents."""
    column = torch.arange(n).expand(batch, n)
    if kind == "padded":
        return {"valid_BT": column >= n // 8}
    return {"document_BT": column // (n // 2)} if kind == "packed" else {}


def linear(peaks: list[int], overhead: float = 1.05) -> bool:
    """Whether a context twice as long needs no more than twice as much."""
    return all(longer <= 2 * overhead * shorter for shorter, longer in pairwise(peaks))


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_in_chunks(attn_type, kind):
    model = small_model(attn_type, max_seq_len=SIZES[-1])
    names = {"valid_BT": "attention_mask", "document_BT": "document_ids"}

    def prefill(n: int) -> None:
        ids, cache = random_ids(1, n), KVCache(n)
        told = {names[name]: given for name, given in about(kind, n).items()}
        for start in range(0, n, CHUNK):
            now = slice(start, start + CHUNK)
            part = {name: given[:, now] for name, given in told.items()}
            ctx = model.context(ids[:, now], cache, start, **part)
            model.hidden(ids[:, now], ctx, Depth(1))

    assert linear([peak(lambda n=n: prefill(n)) for n in SIZES])


def layer_of(attn_type: str, **changes: object) -> GQAttention | MLAttention:
    return randomise(ATTENTION[attn_type](small_config(attn_type, **changes)))


def context(layer: GQAttention | MLAttention, n: int, **arguments: object) -> Context:
    return Context.build(n, layer.cfg.rotaries, CPU, **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_sequences_with_gradient(attn_type, kind):
    layer = layer_of(attn_type)

    def step(n: int) -> None:
        x_BTD = torch.randn(1, n, 32, requires_grad=True)
        layer(x_BTD, context(layer, n, **about(kind, n))).sum().backward()

    step(64)  # gradients of the weights
    # shorter ones take less scratch memory inside the kernel
    assert linear([peak(lambda n=n: step(n)) for n in (2048, 4096)])


def test_scattered_padding_with_gradient(attn_type):
    """Documents that padding stands inside of cannot be computed one by one."""
    layer = layer_of(attn_type)

    def step(n: int) -> None:
        x_BTD, valid_BT = torch.randn(1, n, 32, requires_grad=True), torch.rand(1, n) < 0.8
        layer(x_BTD, context(layer, n, valid_BT=valid_BT)).sum().backward()

    step(64)
    # half as long has small masks, whose size is bounded, not linear
    assert linear([peak(lambda n=n: step(n)) for n in (2048, 4096)])
    assert context(layer, 2048, valid_BT=torch.rand(1, 2048) < 0.8).mask.n_pairs > (
        attention_pieces.WHOLE_PAIRS
    )


def test_a_whole_mask_is_not_linear(attn_type, monkeypatch):
    """Control: with one mask for all queries the tests above would fail."""
    monkeypatch.setattr(attention_pieces, "WHOLE_PAIRS", 1 << 40)
    monkeypatch.setattr(attention_pieces, "DOCUMENT_TOKENS", 1 << 40)
    layer = layer_of(attn_type)

    def forward(n: int) -> None:
        with torch.no_grad():
            layer(torch.randn(1, n, 32), context(layer, n, **about("padded", n)))

    assert not linear([peak(lambda n=n: forward(n)) for n in (1024, 2048)])


class TestBlocks:
    """Attention in parts equals attention at once."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("n_new", "n_old"), [(7, 0), (5, 11), (1, 9)])
    @torch.no_grad()
    def test_absorbed(self, kind, n_new, n_old, monkeypatch):
        layer = layer_of("mla")
        told = about(kind, n_new + n_old, batch=2)
        cache = KVCache()
        cache.columns = cache.columns.extend(
            n_old, **dict.fromkeys(("valid_BT", "document_BT"))
            | {name: given[:, :n_old] for name, given in told.items()}
        )  # fmt: skip
        new = {name: given[:, n_old:] for name, given in told.items()}
        ctx = context(layer, n_new, cache=cache, start_pos=n_old, **new)
        q = layer.query(torch.randn(2, n_new, 32), ctx.rope)
        entry = torch.randn(2, n_new + n_old, 24)
        right = layer.expanded(q, entry, ctx)
        at_once = layer._absorbed_in_blocks(q, entry, ctx)
        for scores in (1, 2 * 4 * (n_new + n_old) * 3):  # one query at a time, then three
            monkeypatch.setattr(mla, "SCORES_AT_ONCE", scores)
            in_blocks = layer._absorbed_in_blocks(q, entry, ctx)
            assert_same(in_blocks, at_once)
            assert_same(in_blocks, right)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("heads", [1, 3])
    @torch.no_grad()
    def test_expanded(self, kind, heads, monkeypatch):
        layer, n = layer_of("mla"), 12
        ctx = context(layer, n, **about(kind, n, batch=2))
        q, entry = layer.query(torch.randn(2, n, 32), ctx.rope), torch.randn(2, n, 24)
        at_once, calls = layer.expanded(q, entry, ctx), []
        attend = mla.attend
        monkeypatch.setattr(mla, "attend", lambda *a, **k: calls.append(1) or attend(*a, **k))
        monkeypatch.setattr(mla, "EXPANDED_AT_ONCE", heads * 2 * n * 22)
        assert_same(layer.expanded(q, entry, ctx), at_once)
        assert len(calls) == -(-4 // heads)

    def test_gradient_never_keeps_all_scores(self, monkeypatch):
        """A layer that would be absorbed expands where autograd would keep too many scores."""
        layer = layer_of("mla", kv_lora_rank=4, qk_nope_head_dim=30)
        assert layer.absorbing_is_cheaper(12, 12)
        x_BTD, taken = torch.randn(1, 12, 32), []
        for name in ("expanded", "absorbed"):
            way = getattr(layer, name)
            monkeypatch.setattr(layer, name, lambda *a, n=name, w=way: taken.append(n) or w(*a))
        monkeypatch.setattr(mla, "SCORES_AT_ONCE", 12 * 12 * 4)
        layer(x_BTD)
        monkeypatch.setattr(mla, "SCORES_AT_ONCE", 12 * 12 * 4 - 1)
        layer(x_BTD)
        assert taken == ["absorbed", "expanded"]


class TestWindow:
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_the_mask_of_its_queries(self, kind):
        ctx = context(layer_of("gqa"), 9, **about(kind, 9))
        whole = ctx.mask.rows() if isinstance(ctx.mask, Visibility) else ctx.window(0, 9).mask
        assert torch.equal(ctx.window(2, 5).mask, whole[:, :, 2:5])
        assert torch.equal(whole.diagonal(dim1=-2, dim2=-1), torch.ones(1, 1, 9).bool())
        assert not ctx.window(2, 5).causal

    def test_of_a_tensor_and_of_nothing(self):
        layer, cache = layer_of("gqa"), KVCache()
        cache.columns = cache.columns.extend(4, None, None)
        single = context(layer, 1, cache=cache, start_pos=4)
        assert single.window(0, 1).mask is None
        mask = torch.rand(2, 1, 3, 7) < 0.5
        ctx = context(layer, 3)
        object.__setattr__(ctx, "mask", mask)
        assert torch.equal(ctx.window(1, 3).mask, mask[:, :, 1:3])


def held(layer: GQAttention | MLAttention, n: int, kind: str) -> KVCache:
    """A cache full of noise up to ``PLACE``, with room for a million positions."""
    cache, told = KVCache(n), about(kind, n)
    slot = torch.randn(1, n, layer.cfg.cache_width)
    cache._slots[layer.layer, 0] = slot
    cache.columns = cache.columns.extend(
        PLACE, *(None if told.get(name) is None else told[name][:, :PLACE]
                 for name in ("valid_BT", "document_BT"))
    )  # fmt: skip
    return cache


WAYS = {
    "gqa": ("gqa", {"n_heads": 2, "n_kv_heads": 1, "dim": 16}),
    "mla absorbed": ("mla", {"n_heads": 2, "dim": 16}),
    "mla expanded": ("mla", {"n_heads": 2, "dim": 16, "kv_lora_rank": 28}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WAYS)
@torch.no_grad()
def test_a_chunk_at_the_end_of_a_million_positions(name, kind):
    attn_type, widths = WAYS[name]
    layer = layer_of(attn_type, max_seq_len=1_000_000, **widths)
    n, new = PLACE + 128, {k: v[:, PLACE:] for k, v in about(kind, PLACE + 128).items()}
    cache, x_BTD = held(layer, n, kind), torch.randn(1, 128, 16)
    if isinstance(layer, MLAttention):
        absorb = name == "mla absorbed"
        layer.absorbing_is_cheaper = lambda n_new, n_all: absorb
    found = []

    def chunk() -> None:
        ctx = context(layer, 128, cache=cache, start_pos=PLACE, **new)
        assert ctx.rope.shape[-2] == 128
        found.append(layer(x_BTD, ctx))

    most = peak(chunk)
    assert most < 4 * cache.nbytes, most / cache.nbytes
    # the last token again, alone: the same entries, another way to attend
    ctx = context(layer, 128, cache=cache, start_pos=PLACE, **new)
    picked = torch.tensor([[127]])
    single = ctx.at(Active(torch.tensor([0]), picked, torch.ones(1, 1, dtype=torch.bool), 128))
    assert_same(layer(x_BTD[:, 127:], single), found[0][:, 127:])
    cache._slots[layer.layer, 0][:, n // 2 + 7 : n // 2 + 2000] += 1
    assert_differs(layer(x_BTD, ctx)[:, 127:], found[0][:, 127:])
