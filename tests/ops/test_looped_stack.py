"""Weight gradients that wait for all loops: the same numbers, whatever else is switched on."""

from __future__ import annotations

import pytest
import torch

import open_mythos.ops.moe as moe
from open_mythos.model import OpenMythos
from open_mythos.ops.moe import LoopedStack, deferring_pays, routed_experts
from open_mythos.train.processes.parallel import apply_activation_checkpointing
from tests.helpers import randomise, small_config


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

    plain = loops(gate_up, down, "reference")
    deferred = loops(LoopedStack(gate_up), LoopedStack(down), "auto")
    for got, expected in zip(deferred, plain, strict=True):
        assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_a_second_backward_counts_nothing_twice() -> None:
    weight = torch.randn(2, 4, 4, requires_grad=True)
    stack = LoopedStack(weight)
    y = stack.product(torch.randn(5, 4), torch.tensor([2, 5], dtype=torch.int32)).sum()
    y.backward(retain_graph=True)
    once = weight.grad.clone()
    y.backward()
    torch.testing.assert_close(weight.grad, 2 * once)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "depth",
    [{"n_loops": 5}, {"n_loops": [2, 4, 7]}, {"n_loops": [2, 5, 3], "grad_loops": 2}],
    ids=["even", "ragged", "truncated"],
)
def test_gradients_of_a_model(
    depth: dict[str, object], autocast: bool, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomise(OpenMythos(small_config("mla")), 0)
    if checkpointed:
        apply_activation_checkpointing(model)
    ids = torch.randint(
        0, model.cfg.vocab_size, (3, 11), generator=torch.Generator().manual_seed(1)
    )
    calls = []
    original = LoopedStack.product
    monkeypatch.setattr(LoopedStack, "product", lambda *args: (calls.append(1), original(*args))[1])

    def gradients(limit: int) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(moe, "DEFERRED_TOKENS", limit)
        calls.clear()
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, **depth).float().square().mean()
        loss.backward()
        assert bool(calls) == (limit > 0)
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    deferred, immediate = gradients(10**9), gradients(0)
    assert deferred.keys() == immediate.keys()
    tolerance = 2e-2 if autocast else 1e-5
    for name, expected in immediate.items():
        error = (deferred[name] - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error <= tolerance, name


def test_the_rule() -> None:
    gate_up = torch.empty(64, 16, 32, requires_grad=True)
    down = torch.empty(64, 16, 16, requires_grad=True)
    assert deferring_pays(64 * moe.DEFERRED_TOKENS, gate_up, down)
    assert not deferring_pays(64 * moe.DEFERRED_TOKENS + 1, gate_up, down)
    assert not deferring_pays(64, gate_up, down, "sorted")
    assert not deferring_pays(64, gate_up.detach(), down)
    with torch.no_grad():
        assert not deferring_pays(64, gate_up, down)
