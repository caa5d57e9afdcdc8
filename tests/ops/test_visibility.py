"""Visibility against a loop over pairs; attention with it against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import assert_differs
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from open_mythos.errors import ConfigError
from open_mythos.ops.attention import attend as attention
from open_mythos.ops.attention import pieces as attention_pieces
from open_mythos.ops.attention.attend import attend
from open_mythos.ops.attention.flex import BLOCK, attend_flex, block_mask, visible_blocks
from open_mythos.ops.attention.pieces import plan_pieces
from open_mythos.ops.attention.visibility import Visibility

CPU = torch.device("cpu")
B, H, G = 3, 4, 2


def runs(*lengths: list[int]) -> Tensor:
    """(B, S) documents of these lengths."""
    return torch.stack([
        torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths
    ])  # fmt: skip


def padding(n: int, *spans: tuple[int, int]) -> Tensor:
    """(B, S) real from the first to before the second of each pair."""
    column = torch.arange(n)
    return torch.stack([(column >= start) & (column < stop) for start, stop in spans])


def kinds(n: int) -> dict[str, Visibility]:
    """Every kind of visibility over ``n`` columns; documents of a third, padding on both sides."""
    third = n // 3
    documents = runs([third, n - third], [1, n - 1], [third, third, n - 2 * third])
    left = padding(n, (third, n), (0, n), (n - 1, n))
    right = padding(n, (0, n - third), (0, 1), (0, n))
    holes = torch.rand(B, n, generator=torch.Generator().manual_seed(3)) < 0.7
    some = torch.rand(B, n, generator=torch.Generator().manual_seed(4)).argsort(1)[:, : n // 2]
    new = n // 4
    return {
        "causal": Visibility(n, n, CPU),
        "chunk": Visibility(new, n, CPU),
        "documents": Visibility(n, n, CPU, run_BS=documents),
        "left": Visibility(n, n, CPU, valid_BS=left),
        "right": Visibility(n, n, CPU, valid_BS=right),
        "holes": Visibility(n, n, CPU, valid_BS=holes),
        "documents and padding": Visibility(n, n, CPU, left, documents),
        "documents and holes": Visibility(n, n, CPU, holes, documents),
        "chunk of documents": Visibility(new, n, CPU, run_BS=documents),
        "chunk with padding": Visibility(new, n, CPU, valid_BS=left),
        "single places": Visibility(n, n, CPU).at(some),
        "places of documents": Visibility(n, n, CPU, left, documents).at(some),
        "places of a chunk": Visibility(new, n, CPU, run_BS=documents).at(some[:, :3] % new),
        "one token": Visibility(1, n, CPU, valid_BS=right),
        "window": Visibility(n, n, CPU).within(4),
        "window of a chunk": Visibility(new, n, CPU).within(3),
        "window of documents": Visibility(n, n, CPU, left, documents).within(3),
        "window with holes": Visibility(n, n, CPU, valid_BS=holes).within(3),
        "window of a chunk with padding": Visibility(new, n, CPU, valid_BS=left).within(4),
        "places in a window": Visibility(n, n, CPU).within(5).at(some),
    }


def slow(seen: Visibility) -> Tensor:
    """(B, T, S) one pair at a time."""
    n, total = seen.n_queries, seen.n_columns
    mask = torch.zeros(B, n, total, dtype=torch.bool)
    for b, i, k in itertools.product(range(B), range(n), range(total)):
        at = total - n + i if seen.columns_BT is None else int(seen.columns_BT[b, i])
        real = seen.valid_BS is None or seen.valid_BS[b, k]
        own = seen.run_BS is None or seen.run_BS[b, k] == seen.run_BS[b, at]
        valid = torch.ones(B, total) if seen.valid_BS is None else seen.valid_BS
        near = not seen.window or int(valid[b, k + 1 : at + 1].sum()) < seen.window
        mask[b, i, k] = k == at or (k < at and real and own and near)
    return mask


def real_queries(seen: Visibility) -> Tensor:
    """(B, T) whether a query is a real token: what the others get is nobody's concern."""
    if seen.valid_BS is None:
        return torch.ones(B, seen.n_queries, dtype=torch.bool)
    return seen.of_queries(seen.valid_BS, 0, seen.n_queries)


def run(seen: Visibility, backend: str, dtype: torch.dtype, key: int = 6, value: int = 6):
    """Output and gradients, of real queries alone."""
    generator = torch.Generator().manual_seed(0)
    n, total = seen.n_queries, seen.n_columns
    shapes = ((B, n, H, key), (B, total, G, key), (B, total, G, value))
    parts = [torch.randn(x, generator=generator).to(dtype).requires_grad_() for x in shapes]
    weights = torch.randn(B, n, H, value, generator=generator) * real_queries(seen)[..., None, None]
    out = attend(*parts, seen, backend=backend)
    (out * weights).sum().backward()
    assert out.isfinite().all()
    return [out.detach() * (weights != 0), *(part.grad for part in parts)]


@pytest.fixture(params=["as it comes", "pieces"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small sequences are masked whole; cut up, they take the ways of long ones."""
    if request.param == "pieces":
        monkeypatch.setattr(attention_pieces, "WHOLE_PAIRS", 0)
        monkeypatch.setattr(attention_pieces, "BLOCK_PAIRS", 1)
        monkeypatch.setattr(attention_pieces, "BLOCK_QUERIES", (5, 5))
        monkeypatch.setattr(attention_pieces, "DOCUMENT_TOKENS", 2)
        monkeypatch.setattr(attention_pieces, "HALF_PAIRS", 2)
    return request.param


class TestMasks:
    @pytest.mark.parametrize("kind", kinds(13))
    def test_whole_and_in_parts(self, kind):
        seen = kinds(13)[kind]
        whole = seen.rows()[:, 0].expand(B, -1, -1)
        assert torch.equal(whole, slow(seen))
        assert seen.n_pairs == seen.rows().numel()
        some = ((0, 1, 0, 13), (0, 1, 2, 9), (1, 3, 2, 9), (2, 3, 0, 5))
        for start, stop, low, high in some[: 2 if seen.n_queries == 1 else 4]:
            part = seen.rows(start, stop, low, high)[:, 0]
            assert torch.equal(part.expand(B, -1, -1), whole[:, start:stop, low:high])

    @pytest.mark.parametrize("kind", kinds(13))
    def test_nothing_is_seen_beyond_a_span(self, kind):
        seen, covered = kinds(13)[kind], 0
        for start, stop, low, high in seen.spans(4):
            mask = slow(seen)[:, start:stop]
            assert not mask[..., :low].any()
            assert not mask[..., high:].any()
            assert start == covered
            covered = stop
        assert covered == seen.n_queries

    def test_spans_leave_out_other_documents(self):
        seen = Visibility(12, 12, CPU, run_BS=runs([4, 8], [4, 8], [4, 8]))
        assert seen.spans(4) == [(0, 4, 0, 4), (4, 8, 4, 8), (8, 12, 4, 12)]

    @pytest.mark.parametrize("kind", kinds(13))
    def test_rows_and_places_can_be_picked(self, kind):
        seen = kinds(13)[kind]
        keep = torch.tensor([2, 0])
        assert torch.equal(seen.select(keep).rows().expand(2, -1, -1, -1)[:, 0], slow(seen)[keep])
        places = torch.tensor([[0], [seen.n_queries - 1], [seen.n_queries // 2]])
        expected = slow(seen).take_along_dim(places.unsqueeze(-1), 1)
        assert torch.equal(seen.at(places).rows()[:, 0], expected)

    def test_whole_masks_are_made_once(self):
        seen = kinds(13)["left"]
        assert seen.whole() is seen.whole()
        assert seen.bias(torch.bfloat16) is seen.bias(torch.bfloat16)
        assert torch.equal(seen.bias(torch.float32) == 0, seen.rows())

    documents = st.lists(
        st.lists(st.tuples(st.booleans(), st.booleans()), min_size=6, max_size=6),
        min_size=1, max_size=3,
    )  # fmt: skip

    @hypothesis_settings(max_examples=100)
    @given(rows=documents)
    def test_documents_and_packing_say_what_the_mask_says(self, rows):
        cuts, valid = torch.tensor(rows).unbind(2)
        seen = Visibility(6, 6, CPU, valid, cuts.long().cumsum(1))
        mask = seen.rows()[:, 0]
        number, borders, longest = seen.packing
        row, column = number // 6, number % 6
        packed = torch.zeros(len(number), len(number), dtype=torch.bool)
        for start, stop in itertools.pairwise(borders.tolist()):
            packed[start:stop, start:stop] = torch.ones(stop - start, stop - start).tril().bool()
        expected = (row[:, None] == row) & mask[row[:, None], column[:, None], column]
        assert torch.equal(packed, expected)
        assert longest == max(borders.diff().tolist(), default=0)
        found = torch.zeros_like(mask)
        for b, start, stop in seen.documents or []:
            found[b, start:stop, start:stop] = torch.ones(stop - start, stop - start).tril().bool()
        real = valid.unsqueeze(2) & valid.unsqueeze(1)
        # without a list, padding stands inside a document
        assert (seen.documents is None) == any(
            inside(*row) for row in zip(cuts, valid, strict=True)
        )
        if seen.documents is not None:
            assert torch.equal(found, mask & real)


def inside(cuts: Tensor, valid: Tensor) -> bool:
    """Whether padding stands between real tokens of one document."""
    run = cuts.long().cumsum(0)
    stretches = [
        key for key, _ in itertools.groupby(zip(run.tolist(), valid.tolist(), strict=True))
    ]
    real = [number for number, is_real in stretches if is_real]
    return len(real) != len(set(real))


class TestBackends:
    @pytest.mark.parametrize("widths", [(6, 6), (7, 4), (3, 5)])
    @pytest.mark.parametrize("kind", kinds(13))
    def test_sdpa_equals_the_reference(self, kind, widths, cut):
        seen = kinds(13)[kind]
        expected = run(seen, "reference", torch.float32, *widths)
        for found, right in zip(run(seen, "sdpa", torch.float32, *widths), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)

    def test_the_ways_are_all_taken(self, cut):
        """Control of the test above."""
        ways = {kind: way(seen) for kind, seen in kinds(13).items()}
        if cut == "as it comes":
            assert set(ways.values()) == {"whole"}
            return
        assert ways["documents"] == ways["left"] == ways["right"] == "documents"
        assert ways["documents and padding"] == "documents"
        assert ways["chunk"] == "past and new"
        masked = ("holes", "chunk of documents", "single places", "places of a chunk", "one token")
        assert {ways[kind] for kind in masked} == {"blocks"}

    @pytest.mark.parametrize(
        ("lengths", "dtype", "expected"),
        [
            ([200, 312], torch.float32, "documents"), ([200, 312], torch.bfloat16, "documents"),
            ([64] * 8, torch.float32, "documents"), ([64] * 8, torch.bfloat16, "whole"),
            ([64] * 16, torch.bfloat16, "documents"), ([63] * 16, torch.float32, "whole"),
            ([63] * 17, torch.float32, "blocks"),
        ],
    )  # fmt: skip
    def test_when_documents_are_computed_one_by_one(self, lengths, dtype, expected):
        seen = Visibility(sum(lengths), sum(lengths), CPU, run_BS=runs(lengths))
        assert way(seen, dtype) == expected

    def test_no_rows_left(self, cut):
        """A process whose rows have all left goes on with none."""
        for seen in (kinds(13)["documents"].select(torch.tensor([], dtype=torch.long)),
                     kinds(13)["chunk"]):  # fmt: skip
            q, (k, v) = torch.randn(0, seen.n_queries, H, 4), torch.randn(2, 0, 13, G, 4)
            assert attend(q, k, v, seen).shape == (0, seen.n_queries, H, 4)

    @pytest.mark.parametrize("kind", ["chunk", "documents", "holes", "single places"])
    def test_half_precision(self, kind, cut):
        seen = kinds(40)[kind]
        exact = run(seen, "reference", torch.float32)
        for found, right in zip(run(seen, "sdpa", torch.bfloat16), exact, strict=True):
            assert (found.float() - right).norm() < 0.02 * right.norm()

    @pytest.mark.parametrize("kind", kinds(13))
    def test_recomputed_blocks(self, kind, monkeypatch):
        """What a GPU does without flash or flex, here on the CPU."""
        seen, sizes = kinds(13)[kind], [1 << 24, 13 * B * 4]
        expected = run(seen, "reference", torch.float32)
        for pairs in sizes:
            monkeypatch.setattr(attention, "MASK_PAIRS", pairs)
            monkeypatch.setattr(
                attention, "_sdpa",
                lambda q, k, v, mask, causal, scale: attention._sdpa_blocks(q, k, v, mask, scale),
            )  # fmt: skip
            monkeypatch.setitem(attention._BACKENDS, "here", attention._sdpa)
            for found, right in zip(run(seen, "here", torch.float32), expected, strict=True):
                torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("kind", kinds(13))
    def test_flex_forward(self, kind):
        """On a CPU it has no backward."""
        seen = kinds(13)[kind]
        q = torch.randn(B, seen.n_queries, H, 16)
        k, v = torch.randn(2, B, seen.n_columns, G, 16)
        right = attend(q, k, v, seen, backend="reference")
        found = attend(q, k, v, seen, backend="flex")
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)

    def test_flex_without_a_visibility(self):
        q, k, v = torch.randn(3, B, 9, H, 16)
        for causal in (True, False):
            right = attend(q, k, v, causal=causal, backend="reference")
            found = attend(q, k, v, causal=causal, backend="flex")
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)

    def test_flex_rejects(self):
        q, k, v = torch.randn(3, B, 9, H, 16)
        with pytest.raises(ConfigError, match="a mask"):
            attend(q, k, v, torch.ones(1, 1, 9, 9, dtype=torch.bool), backend="flex")
        with pytest.raises(ConfigError, match="a gradient on the CPU"):
            attend(q.requires_grad_(), k, v, causal=True, backend="flex")

    @pytest.mark.parametrize("backend", ["sdpa", "flex", "reference"])
    @pytest.mark.parametrize("kind", ["chunk", "documents", "left", "holes", "single places"])
    def test_a_wrong_mask_is_noticed(self, kind, backend, cut):
        """Control: one column too few for one row's queries."""
        seen = kinds(13)[kind]
        q, (k, v) = torch.randn(B, seen.n_queries, H, 16), torch.randn(2, B, 13, G, 16)
        mask = seen.rows().expand(B, -1, -1, -1).clone()
        real = real_queries(seen)[1]
        query = int((mask[1, 0].sum(1) * real).argmax())  # the one that sees most
        mask[1, 0, query, int(mask[1, 0, query].int().argmax())] = False
        wrong = attend(q, k, v, mask, backend="reference")[1, query]
        assert_differs(wrong, attend(q, k, v, seen, backend=backend)[1, query])

    def test_it_can_be_differentiated_twice_without_the_kernel(self, cut):
        seen = kinds(7)["left"]
        q, (k, v) = torch.randn(B, 7, H, 4, requires_grad=True), torch.randn(2, B, 7, G, 4)
        with sdpa_kernel(SDPBackend.MATH):
            out = attend(q, k, v, seen)
            (once,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
            (twice,) = torch.autograd.grad(once.square().sum(), q)
        assert twice.abs().max() > 0


def way(seen: Visibility, dtype: torch.dtype = torch.float32) -> str:
    """How a CPU computes it."""
    pieces = plan_pieces(seen, dtype)
    if pieces is None:
        return "whole"
    if [(piece.causal, piece.masked) for piece in pieces] == [(True, False), (False, False)]:
        return "past and new"
    return "blocks" if pieces[0].rows == slice(None) else "documents"


class TestBlocksOfFlex:
    @pytest.mark.parametrize("n", [2 * BLOCK, 3 * BLOCK + 17])
    @pytest.mark.parametrize("kind", kinds(13))
    def test_they_say_what_the_mask_says(self, kind, n):
        seen = kinds(n)[kind]
        mask = seen.rows()[:, 0]
        some, full = (x.expand(len(mask), -1, -1) for x in visible_blocks(seen))
        for i, j in itertools.product(*map(range, some.shape[1:])):
            pairs = mask[:, i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK].flatten(1)
            assert not (pairs.any(1) & ~some[:, i, j]).any()
            assert not (full[:, i, j] & ~pairs.all(1)).any()

    def test_blocks_are_left_out(self):
        """Control: documents and causality save blocks, and most of the rest needs no mask."""
        n = 8 * BLOCK
        seen = Visibility(n, n, CPU, run_BS=runs([n // 2, n // 2]))
        some, full = visible_blocks(seen)
        assert int(some.sum()) == 2 * (4 * 5 // 2)
        assert int(full.sum()) == 2 * (4 * 3 // 2)
        assert block_mask(seen).sparsity() == pytest.approx(100 * (1 - 20 / 64))

    @pytest.mark.parametrize("kind", ["documents and holes", "places of documents", "chunk"])
    def test_attention_over_several_blocks(self, kind):
        seen = kinds(2 * BLOCK + 9)[kind]
        q = torch.randn(B, seen.n_queries, H, 16)
        k, v = torch.randn(2, B, seen.n_columns, G, 16)
        right = attend(q, k, v, seen, backend="reference")
        torch.testing.assert_close(
            attend_flex(q, k, v, seen, 16**-0.5), right, rtol=1e-4, atol=1e-5
        )
