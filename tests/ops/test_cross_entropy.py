"""Chunked cross-entropy against its reference: values, gradients, memory; and its backends."""

import logging
from itertools import accumulate
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from open_mythos.ops import backend as choice
from open_mythos.ops import cross_entropy
from open_mythos.ops.cross_entropy import (
    chunk_rows,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)


def problem(batch, tokens, dim, vocab, ignored=0.3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(batch * 1000 + tokens * 10 + vocab)
    hidden = torch.randn(batch, tokens, dim, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, dim, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocab, (batch, tokens), generator=generator)
    drop = torch.rand(batch, tokens, generator=generator) < ignored
    return hidden, weight, targets.masked_fill(drop, -100)


def with_gradients(fn, hidden, weight, targets, **options):
    loss = fn(hidden, weight, targets, **options)
    return loss, *torch.autograd.grad(3.0 * loss, (hidden, weight))


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 9),
    vocab=st.integers(2, 17),
    chunk=st.integers(1, 30),
    block=st.integers(1, 1000),
    reduction=st.sampled_from(["sum", "mean"]),
)
def test_equals_reference(batch, tokens, vocab, chunk, block, reduction):
    inputs = problem(batch, tokens, 5, vocab)
    with patch.object(cross_entropy, "BLOCK_BYTES", block):
        got = with_gradients(linear_cross_entropy, *inputs, chunk=chunk, reduction=reduction)
    want = with_gradients(linear_cross_entropy_reference, *inputs, reduction=reduction)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_reference_is_torch_cross_entropy():
    hidden, weight, targets = problem(2, 7, 5, 11)
    mine = linear_cross_entropy_reference(hidden, weight, targets)
    theirs = torch.nn.functional.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_all_ignored_is_zero(reduction):
    hidden, weight, targets = problem(2, 3, 4, 5, ignored=2.0)
    assert (targets == -100).all()
    for fn in (linear_cross_entropy, linear_cross_entropy_reference):
        loss, *grads = with_gradients(fn, hidden, weight, targets, reduction=reduction)
        assert loss == 0
        assert all((grad == 0).all() for grad in grads)


def test_other_ignore_index():
    hidden, weight, _ = problem(1, 4, 4, 5)
    targets = torch.tensor([[1, 2, 0, 0]])
    mine = linear_cross_entropy(hidden, weight, targets, ignore_index=0)
    torch.testing.assert_close(mine, linear_cross_entropy(hidden[:, :2], weight, targets[:, :2]))


def test_large_logits_stay_finite():
    hidden, weight, targets = problem(1, 6, 4, 9, ignored=0)
    loss, *grads = with_gradients(linear_cross_entropy, hidden * 1e4, weight, targets, chunk=4)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_autocast_uses_bfloat16_matmuls_and_float32_sums():
    inputs = problem(2, 300, 32, 40)
    exact = with_gradients(linear_cross_entropy_reference, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = with_gradients(linear_cross_entropy, *inputs, chunk=7)
    assert mixed[0].dtype == torch.float32
    assert mixed[1].dtype == mixed[2].dtype == torch.float32
    assert not torch.equal(mixed[0], exact[0])  # it did run in bfloat16
    for mine, theirs in zip(mixed, exact, strict=True):
        assert (mine - theirs).norm() <= 0.02 * theirs.norm()


def test_bfloat16_weights_get_bfloat16_gradients():
    hidden, weight, targets = problem(2, 33, 16, 12, dtype=torch.bfloat16)
    mine = with_gradients(linear_cross_entropy, hidden, weight, targets, chunk=5)
    theirs = with_gradients(linear_cross_entropy_reference, hidden, weight, targets)
    assert mine[1].dtype == mine[2].dtype == torch.bfloat16
    for a, b in zip(mine, theirs, strict=True):
        assert (a.float() - b.float()).norm() <= 0.02 * b.float().norm()


def test_gradients_of_one_input_only():
    hidden, weight, targets = problem(1, 5, 4, 6)
    want = with_gradients(linear_cross_entropy_reference, hidden, weight, targets)
    frozen = linear_cross_entropy(hidden, weight.detach(), targets)
    torch.testing.assert_close(torch.autograd.grad(3 * frozen, hidden)[0], want[1])
    frozen = linear_cross_entropy(hidden.detach(), weight, targets)
    torch.testing.assert_close(torch.autograd.grad(3 * frozen, weight)[0], want[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_blocks_of_half_precision(dtype, monkeypatch):
    inputs = problem(3, 7, 9, 23)
    want = with_gradients(linear_cross_entropy_reference, *inputs)
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 100)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        got = with_gradients(linear_cross_entropy, *inputs, chunk=5)
    for mine, theirs in zip(got, want, strict=True):
        assert (mine - theirs).norm() <= (0.02 if dtype == torch.bfloat16 else 1e-6) * theirs.norm()


def test_the_weight_gradient_is_summed_in_float32():
    """In bfloat16 the sum of many small chunks stops growing."""
    hidden, weight = torch.ones(4096, 1), torch.zeros(2, 1, requires_grad=True)
    targets = torch.zeros(4096, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, chunk=1, reduction="sum")
    loss.backward()
    assert weight.grad.flatten().tolist() == [-2048.0, 2048.0]
    low = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(4096):
        low += 0.5
    assert low < 2048


def test_what_does_not_count_may_be_anything():
    hidden, weight, targets = problem(2, 6, 4, 5)
    want = with_gradients(linear_cross_entropy_reference, hidden, weight, targets)
    spoilt = hidden.detach().masked_fill((targets == -100).unsqueeze(-1), torch.nan)
    got = with_gradients(linear_cross_entropy, spoilt.requires_grad_(), weight, targets, chunk=5)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_graph_may_be_used_twice():
    hidden, weight, targets = problem(2, 6, 4, 5)
    loss = linear_cross_entropy(hidden, weight, targets)
    first, second = (
        torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True) for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_tied_weights():
    """The head's weight is the embedding too: the gradients of both uses are added."""
    _, weight, targets = problem(2, 6, 4, 11)
    ids = torch.randint(11, targets.shape)
    for chunk in (None, 5):
        hidden = torch.tanh(torch.nn.functional.embedding(ids, weight))
        mine = linear_cross_entropy(hidden, weight, targets, chunk=chunk)
        theirs = linear_cross_entropy_reference(hidden, weight, targets)
        torch.testing.assert_close(
            *(torch.autograd.grad(x, weight, retain_graph=True)[0] for x in (mine, theirs))
        )


@pytest.mark.parametrize("half", [False, True])
def test_never_holds_the_logits_of_the_batch(half, monkeypatch):
    """One chunk of logits in the dtype of the products, and blocks that are small beside it."""
    n, dim, vocab, size = 1024, 16, 4096, 2 if half else 4
    chunk_bytes, block = 64 * vocab * size, 4096 * 4 * 4
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", block)
    inputs = torch.randn(n, dim, requires_grad=True), torch.randn(vocab, dim, requires_grad=True)
    targets = torch.randint(vocab, (n,))

    def peak(fn):
        with (
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
            profile(
                activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
            ) as profiler,
        ):
            fn(*inputs, targets)
        events = profiler.profiler.kineto_results.events()
        sizes = [each for each in events if each.name() == "[memory]"]
        sizes.sort(key=lambda each: each.start_ns())
        return max(accumulate(each.nbytes() for each in sizes))

    gradients = 4 * sum(each.numel() for each in inputs)
    copies = sum(each.numel() for each in inputs) * size + 64 * n
    found, logits = peak(linear_cross_entropy), n * vocab * 4
    # with several threads, products in half precision take as much as their result once more
    assert chunk_bytes + gradients < found < 2 * chunk_bytes + gradients + copies + 3 * block
    assert found < logits / 4
    assert peak(linear_cross_entropy_reference) > logits  # so it can be measured


@given(
    n_rows=st.integers(0, 10**6),
    vocab=st.integers(1, 10**6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_chunks_are_equal_and_within_their_bytes(n_rows, vocab, dtype, device):
    rows = chunk_rows(n_rows, vocab, dtype, torch.device(device))
    limit = getattr(cross_entropy, "CHUNK_BYTES" if device == "cpu" else "ACCELERATOR_CHUNK_BYTES")
    assert rows == 1 or rows * vocab * dtype.itemsize <= limit
    chunks = -(-n_rows // rows)
    assert chunks == max(1, -(-n_rows // max(1, limit // (vocab * dtype.itemsize)))) or not n_rows
    assert (
        n_rows == 0 or chunks * rows - n_rows < chunks
    )  # the last is short by less than a row each


def test_without_autograd_prepares_no_gradient(monkeypatch):
    hidden, weight, targets = problem(1, 5, 4, 6)
    want = linear_cross_entropy(hidden, weight, targets)
    monkeypatch.setattr(torch, "empty_like", lambda *a, **o: pytest.fail("a gradient buffer"))
    monkeypatch.setattr(Tensor, "exp_", lambda self: pytest.fail("a softmax"))
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets), want.detach())


def test_rejects_shapes_that_do_not_match():
    hidden, weight, targets = problem(1, 5, 4, 6)
    for wrong in ((hidden, weight, targets[:, :4]), (hidden, weight[:, :3], targets)):
        with pytest.raises(AssertionError):
            linear_cross_entropy(*wrong)


class TestBackends:
    def test_auto_is_logged_once(self, caplog):
        choice._log_once.cache_clear()
        with caplog.at_level(logging.INFO):
            for _ in range(3):
                linear_cross_entropy(*problem(1, 5, 4, 6))
        assert [each.getMessage() for each in caplog.records] == ["loss backend: chunked"]

    @pytest.mark.parametrize(
        ("device", "dtype", "installed", "chosen"),
        [
            ("cuda", torch.bfloat16, True, "liger"),
            ("cuda", torch.float16, True, "liger"),
            ("cuda", torch.bfloat16, False, "chunked"),
            ("cuda", torch.float32, True, "chunked"),
            ("cpu", torch.bfloat16, True, "chunked"),
        ],
    )
    def test_auto(self, device, dtype, installed, chosen, monkeypatch):
        monkeypatch.setattr(cross_entropy, "_liger_installed", lambda: installed)
        assert cross_entropy._choose(torch.device(device), dtype) == chosen
