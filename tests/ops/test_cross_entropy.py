"""Chunked cross-entropy against its plain twin: values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_mythos.errors import ConfigError
from open_mythos.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference


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
    reduction=st.sampled_from(["sum", "mean"]),
)
def test_equals_reference(batch, tokens, vocab, chunk, reduction):
    inputs = problem(batch, tokens, 5, vocab)
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


def test_autocast_uses_bfloat16_products_and_float32_sums():
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


def test_never_holds_the_logits_of_the_batch(monkeypatch):
    sizes = []
    plain = torch.log_softmax
    monkeypatch.setattr(torch, "log_softmax", lambda x, **o: sizes.append(x.shape) or plain(x, **o))
    linear_cross_entropy(*problem(3, 10, 4, 6), chunk=8)
    assert sizes == [(8, 6), (8, 6), (8, 6), (6, 6)]


def test_without_autograd_prepares_no_gradient(monkeypatch):
    hidden, weight, targets = problem(1, 5, 4, 6)
    want = linear_cross_entropy(hidden, weight, targets)
    monkeypatch.setattr(torch, "zeros_like", lambda *a, **o: pytest.fail("a gradient buffer"))
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets), want.detach())


@pytest.mark.parametrize(
    "options",
    [{"reduction": "none"}, {"chunk": 0}, {"targets": torch.zeros(1, 4, dtype=torch.long)}],
)
def test_refuses(options):
    hidden, weight, targets = problem(1, 5, 4, 6)
    targets = options.pop("targets", targets)
    with pytest.raises(ConfigError):
        linear_cross_entropy(hidden, weight, targets, **options)
