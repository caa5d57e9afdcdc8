"""``RecurrentBlock.forward`` against its reference implementation, ``RecurrentBlock.unroll``."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_differs, assert_same, random_ids, small_model
from torch import Tensor

from open_mythos import Depth, LoopTrace, OpenMythos
from open_mythos.model.context import Context

B, T, LOOPS = 3, 6, 7


def reference(model: OpenMythos, ids: Tensor, ctx: Context, depths: list[int], k: int | None):
    """Final states (B, T, D), every row alone, loop by loop."""
    rows = []
    for row, depth in enumerate(depths):
        one = ids[row : row + 1]
        alone = model.context(one, sample_seeds=None if ctx.keys_B is None else ctx.keys_B[[row]])
        loops = model.recurrent.unroll(model.embed(one, alone), alone, depth, grad_loops=k)
        rows.append([h for _, h in loops][-1])
    return torch.cat(rows)


def gradients(model: OpenMythos, h: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (h * torch.randn(h.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("grad_loops", [None, 1, 3, 9])
@pytest.mark.parametrize("depths", [[LOOPS] * B, [5, 1, 4], [2, 7, 7]], ids=str)
@pytest.mark.parametrize("changes", [{}, {"initial_state": "normal", "loop_embedding": True}])
def test_forward_equals_unroll(attn_type, depths, grad_loops, changes):
    """States and gradients, truncated backpropagation included."""
    model, ids = small_model(attn_type, **changes), random_ids(B, T)
    ctx = model.context(ids, sample_seeds=torch.arange(B))
    slow = reference(model, ids, ctx, depths, grad_loops)
    expected = gradients(model, slow)
    fast = model.recurrent(model.embed(ids, ctx), ctx, Depth(depths, grad_loops=grad_loops))
    assert_same(fast.detach(), slow.detach(), tolerance=1e-5)
    found = gradients(model, fast)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4, msg=name)


def test_truncation_is_seen(attn_type):
    """Control: the gradients of truncated and of full backpropagation differ."""
    model, ids = small_model(attn_type), random_ids(B, T)
    ctx = model.context(ids)
    cut, whole = (
        gradients(model, reference(model, ids, ctx, [LOOPS] * B, k))["embedding.weight"]
        for k in (2, None)
    )
    assert_differs(cut, whole)


@torch.no_grad()
def test_every_state_equals_that_of_a_call_of_its_depth(model):
    ids, trace = random_ids(B, T), LoopTrace(keep_states=True)
    ctx = model.context(ids)
    for t, h in model.unroll(ids, 5, ctx, trace=trace):
        assert torch.equal(trace.states[t], h)
        assert_same(model.logits(h, ctx), model(ids, t + 1))


@torch.no_grad()
def test_unroll_continues_from_a_state(model):
    ids = random_ids(B, T)
    ctx = model.context(ids)
    e, states = model.embed(ids, ctx), [h for _, h in model.unroll(ids, 5, ctx)]
    later = model.recurrent.unroll(e, ctx, 3, h_BTD=states[1], first_loop=2)
    for t, h in later:
        assert torch.equal(h, states[t])


class TestLoopIndexPerRow:
    """Rows at different depths in one ``step``, as an engine that batches by depth runs them."""

    T_R = (6, 0, 3)

    @pytest.mark.parametrize("changes", [{}, {"loop_embedding": True, "dropout": 0.3}], ids=str)
    @torch.no_grad()
    def test_rows_equal_rows_alone(self, attn_type, changes):
        model, ids = small_model(attn_type, **changes).train(), random_ids(B, T)
        seeds = torch.arange(5, 5 + B)
        ctx = model.context(ids, sample_seeds=seeds)
        h, e = torch.randn(2, B, T, 32, generator=torch.Generator().manual_seed(0))
        together = model.step(h, e, torch.tensor(self.T_R), ctx)
        for row, t in enumerate(self.T_R):
            alone = model.context(ids[row : row + 1], sample_seeds=seeds[row : row + 1])
            one = slice(row, row + 1)
            for index in (t, torch.tensor([t])):
                assert_same(together[one], model.step(h[one], e[one], index, alone), 1e-5)

    @torch.no_grad()
    def test_the_index_matters(self, model):
        """Control: each row has its own adapter."""
        h, e = torch.randn(2, B, T, 32, generator=torch.Generator().manual_seed(0))
        ctx = model.context(random_ids(B, T))
        rows = model.step(h, e, torch.tensor([3, 0, 3]), ctx)
        assert_differs(rows[1], model.step(h, e, 3, ctx)[1])
