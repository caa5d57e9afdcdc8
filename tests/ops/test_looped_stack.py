"""Deferred weight gradients equal immediate ones, in every combination of features."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import open_mythos.ops.experts.looped_stack as looped_stack
import open_mythos.ops.experts.routed as moe
from open_mythos.errors import ConfigError
from open_mythos.model.layers.experts import RoutedExperts
from open_mythos.model.mythos import OpenMythos
from open_mythos.ops.experts.looped_stack import LoopedStack
from open_mythos.ops.experts.routed import deferring_pays, routed_experts
from tests.helpers import assert_same, random_ids, randomise, small_config, small_model


def choices(tokens: int, experts: int, chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(tokens)
    scores = torch.rand(tokens, experts)
    return scores.topk(chosen, -1).indices, torch.rand(tokens, chosen)


@pytest.mark.parametrize("tokens", [1, 3, 33])
def test_equals_the_reference_over_several_uses(tokens: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(tokens, 16, requires_grad=True)
    gate_up = torch.randn(6, 16, 24).mul(0.3).requires_grad_()
    down = torch.randn(6, 12, 16).mul(0.3).requires_grad_()

    def loops(stack_gate_up: object, stack_down: object, backend: str) -> list[torch.Tensor]:
        h = x
        for t in range(3):
            h = h + routed_experts(
                h, stack_gate_up, stack_down, *choices(tokens, 6 - t, 2), backend=backend
            )
        (h**2).sum().backward()
        grads = [h.detach(), x.grad, gate_up.grad, down.grad]
        x.grad = gate_up.grad = down.grad = None
        return grads

    reference = loops(gate_up, down, "reference")
    deferred = loops(LoopedStack(gate_up), LoopedStack(down), "auto")
    for got, expected in zip(deferred, reference, strict=True):
        assert (got - expected).norm() <= 1e-5 * expected.norm()


def experts() -> tuple[torch.Tensor, ...]:
    """Return tokens, choices, weights, and the two stacks, which need gradients."""
    torch.manual_seed(1)
    x, (chosen, weights) = torch.randn(5, 16, requires_grad=True), choices(5, 4, 2)
    gate_up, down = torch.randn(4, 16, 24), torch.randn(4, 12, 16)
    return x, chosen, weights, gate_up.requires_grad_(), down.requires_grad_()


def test_second_backward_does_not_double_count() -> None:
    x, chosen, weights, *stacks = experts()
    y = routed_experts(x, *map(LoopedStack, stacks), chosen, weights).sum()
    y.backward(retain_graph=True)
    once = [stack.grad.clone() for stack in stacks]
    y.backward()
    for stack, first in zip(stacks, once, strict=True):
        torch.testing.assert_close(stack.grad, 2 * first)


def test_uses_of_an_interrupted_backward_are_dropped() -> None:
    """A gradient of the tokens alone never reaches the stacks."""
    x, chosen, weights, *stacks = experts()
    y = routed_experts(x, *map(LoopedStack, stacks), chosen, weights).sum()
    expected = torch.autograd.grad(y, stacks, retain_graph=True)
    torch.autograd.grad(y, x, retain_graph=True)
    y.backward()
    for stack, once in zip(stacks, expected, strict=True):
        torch.testing.assert_close(stack.grad, once)


def test_freeing_the_graph_frees_its_uses() -> None:
    x, chosen, weights, *stacks = experts()
    gc.collect()
    before = len(looped_stack._alive)
    y = routed_experts(x, *map(LoopedStack, stacks), chosen, weights).sum()
    torch.autograd.grad(y, x)
    assert len(looped_stack._alive) == before + 2
    del y
    gc.collect()
    assert len(looped_stack._alive) == before


def test_second_derivatives_are_rejected() -> None:
    x, chosen, weights, *stacks = experts()
    y = routed_experts(x, *map(LoopedStack, stacks), chosen, weights).sum()
    with pytest.raises(ConfigError, match="cannot be differentiated twice"):
        torch.autograd.grad(y, x, create_graph=True)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("depth", "uses"),
    [
        ({"n_loops": 5}, 5),
        ({"n_loops": [2, 4, 7]}, 7),
        ({"n_loops": [2, 5, 3], "grad_loops": 2}, 5),
        ({"n_loops": 5, "grad_loops": 2}, 2),
    ],
    ids=["even", "ragged", "ragged, truncated", "truncated"],
)
def test_gradients_of_a_model(
    depth: dict[str, object],
    uses: int,
    autocast: bool,
    checkpointed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = randomise(OpenMythos(small_config("mla")), 0)
    if checkpointed:
        model.recurrent.checkpoint = True
    ids = torch.randint(
        0, model.cfg.vocab_size, (3, 11), generator=torch.Generator().manual_seed(1)
    )
    calls = []
    original = looped_stack.weight_gradient
    monkeypatch.setattr(
        looped_stack,
        "weight_gradient",
        lambda uses, dtype: (calls.append(len(uses)), original(uses, dtype))[1],
    )

    def gradients(limit: int) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(moe, "DEFERRED_TOKENS", limit)
        calls.clear()
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, **depth).float().square().mean()
        loss.backward()
        assert sum(calls) == (2 * uses if limit else 0)
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    deferred, immediate = gradients(10**9), gradients(0)
    assert deferred.keys() == immediate.keys()
    tolerance = 2e-2 if autocast else 1e-5
    for name, expected in immediate.items():
        error = (deferred[name] - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error <= tolerance, name


def test_when_deferring_pays() -> None:
    gate_up = torch.empty(64, 16, 32, requires_grad=True)
    down = torch.empty(64, 16, 16, requires_grad=True)
    assert deferring_pays(64 * moe.DEFERRED_TOKENS, gate_up, down)
    assert not deferring_pays(64 * moe.DEFERRED_TOKENS + 1, gate_up, down)
    assert not deferring_pays(64, gate_up, down, "reference")
    assert not deferring_pays(64, gate_up.detach(), down)
    with torch.no_grad():
        assert not deferring_pays(64, gate_up, down)


def test_checkpointing_around_the_whole_call():
    """The recomputation creates new stacks; the gradients belong to the original ones."""
    model, ids = small_model(), random_ids(2, 9)
    found = []
    for call in (lambda run: run(), lambda run: checkpoint(run, use_reentrant=False)):
        model.zero_grad(set_to_none=True)
        call(lambda: model(ids, 3)).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert "recurrent.blocks.0.ffn.gate_up" in found[0]
    for name, gradient in found[0].items():
        assert gradient.any()
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.parametrize("limit", [0.01, 1, 2, 100])
def test_deferred_memory_is_bounded(limit: float, monkeypatch) -> None:
    model, ids = small_model(), random_ids(2, 9)
    sizes: list[tuple[int, int]] = []
    original = looped_stack.weight_gradient

    def noted(uses: list[looped_stack.Use], dtype: torch.dtype) -> torch.Tensor:
        gradient = original(uses, dtype)
        sizes.append((sum(use.size for use in uses), gradient.numel()))
        return gradient

    def gradients(backend: str) -> list[torch.Tensor]:
        for module in model.modules():
            if hasattr(module, "router_bias"):
                module.experts = RoutedExperts(backend)
        model.zero_grad(set_to_none=True)
        model(ids, 12).square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    expected = gradients("reference")
    monkeypatch.setattr(looped_stack, "weight_gradient", noted)
    monkeypatch.setattr(looped_stack, "DEFERRED_SIZE", limit)
    for one, other in zip(gradients("auto"), expected, strict=True):
        assert_same(one, other)
    one_use = 2 * 9 * (32 + 2 * 2 * 16)  # tokens of a loop, and the rows of their choices
    assert all(saved <= limit * stack + one_use for saved, stack in sizes)
    assert len(sizes) == {0.01: 24, 100: 2}.get(limit, len(sizes))


def test_gradients_accumulate_in_the_dtype_of_the_weights(monkeypatch) -> None:
    """Many small bfloat16 gradients of float32 weights: bfloat16 sums would lose most digits."""
    monkeypatch.setattr(looped_stack, "DEFERRED_SIZE", 0)
    x, chosen, weights, gate_up, down = experts()
    loops = 64
    distances = []
    for lower in (True, False):
        stacks = [
            LoopedStack(each.bfloat16() if lower else each, each.bfloat16())
            for each in (gate_up, down)
        ]
        y = sum(routed_experts(x.detach(), *stacks, chosen, weights.detach()) for _ in range(loops))
        found = torch.autograd.grad(y.float().sum(), (gate_up, down))
        exact = torch.autograd.grad(
            routed_experts(x.detach(), gate_up, down, chosen, weights.detach()).sum(),
            (gate_up, down),
        )  # fmt: skip
        assert all(each.dtype == torch.float32 for each in found)
        distances.append([
            float((a - loops * b).norm() / (loops * b).norm())
            for a, b in zip(found, exact, strict=True)
        ])  # fmt: skip
    for coarse, fine in zip(*distances, strict=True):
        assert fine < 0.02
        assert fine < 0.7 * coarse


def test_what_waits_is_a_copy() -> None:
    """A compiler may overwrite the operands of an op after it, before the gradient is computed."""
    x, which = torch.randn(3, 16), torch.tensor([2, 0])
    rows, before = looped_stack.saved_rows(x, which), x[which].clone()
    x.zero_()
    out = torch.empty(2, 16)
    rows.write(0, 2, out)
    assert torch.equal(out, before)
    token = LoopedStack(torch.randn(4, 16, 8, requires_grad=True)).token
    ends, uses = torch.tensor([0, 1, 2, 2]), looped_stack._alive[int(token)]
    looped_stack.defer_gradient(token, rows, looped_stack.Rows(torch.randn(2, 8)), ends)
    ends.zero_()
    assert uses._saved[0].ends_E.tolist() == [0, 1, 2, 2]
