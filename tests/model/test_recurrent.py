"""The loop: depth per row, exits, truncated gradients, initial states, saturation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import assert_differs, assert_same, random_ids, small_config, small_model
from torch import Tensor

from open_mythos import KVCache, LoopTrace, OpenMythos, RecurrentBlock
from open_mythos.errors import ConfigError
from open_mythos.model.depth import Depth
from open_mythos.model.exit_rules import FixedDepth, Look, Memory

B, T = 4, 6


@torch.no_grad()
def full(model: OpenMythos, ids: Tensor, n_loops: int | list[int], **arguments: object) -> Tensor:
    return model(ids, n_loops, **arguments)


class TestDepth:
    @pytest.mark.parametrize("n_loops", [[1, 4, 16, 2], [5, 5, 1, 5], [3, 2, 1, 3], [7, 7, 7, 7]])
    def test_each_row_runs_its_own(self, model, n_loops):
        ids = random_ids(B, T)
        logits = full(model, ids, n_loops)
        for row, depth in enumerate(n_loops):
            assert_same(logits[row], full(model, ids, depth)[row])

    @pytest.mark.parametrize(
        "given", [[2, 3, 1, 5], (2, 3, 1, 5), torch.tensor([2, 3, 1, 5])], ids=lambda g: type(g)
    )
    def test_spellings(self, model, given):
        ids = random_ids(B, T)
        assert torch.equal(full(model, ids, given), full(model, ids, [2, 3, 1, 5]))

    def test_a_tensor_of_one_number_is_a_number(self, model):
        ids = random_ids(B, T)
        assert torch.equal(full(model, ids, torch.tensor(3)), full(model, ids, 3))

    @pytest.mark.parametrize("n_loops", [3, [1, 6, 2, 2]])
    def test_finished_rows_are_not_computed(self, model, n_loops):
        """An exit saves real compute: the blocks see the remaining rows alone."""
        seen = []
        block = model.recurrent.blocks[0]
        hook = block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
        full(model, random_ids(B, T), n_loops)
        hook.remove()
        depths = [n_loops] * B if isinstance(n_loops, int) else n_loops
        assert seen == [sum(depth > t for depth in depths) for t in range(max(depths))]

    def test_a_state_may_be_handed_in(self, model):
        """Five loops are two loops and then three, from the state in between."""
        ids = random_ids(B, T)
        with torch.no_grad():
            ctx = model.context(ids)
            e = model.embed(ids, ctx)
            h = e
            for t in range(3):
                h = model.step(h, e, t, ctx)
            assert_same(model.recurrent(e, ctx, Depth(3), h_BTD=e), h)


class LeaveAfter:
    """A rule by which row i stops after ``depths[i]`` loops; its memory is the depths."""

    def __init__(self, depths: list[int]) -> None:
        self.depths = torch.tensor(depths)
        self.looks: list[Look] = []

    def __call__(self, look: Look, memory: Memory | None) -> tuple[Tensor, Memory]:
        self.looks.append(look)
        shape = look.after_BTD.shape[:2]
        depths = self.depths.unsqueeze(1).expand(shape) if memory is None else memory[0]
        assert look.before_BTD.shape == look.after_BTD.shape
        assert depths.shape == shape
        return look.t + 1 >= depths, (depths,)


class TestExitRule:
    @pytest.mark.parametrize("depths", [[1, 4, 7, 2], [3, 3, 3, 3], [9, 1, 1, 1]])
    def test_exits_equal_depth_per_row(self, model, depths):
        ids, rule = random_ids(B, T), LeaveAfter(depths)
        logits = full(model, ids, 9, exit_rule=rule)
        assert_same(logits, full(model, ids, depths), tolerance=1e-6)
        assert [look.after_BTD.shape[:2] for look in rule.looks] == [
            (sum(d > t for d in depths), T) for t in range(max(depths))
        ]

    def test_exits_equal_depth_per_row_on_a_cache(self, model):
        ids, left, told = random_ids(B, T), KVCache(), KVCache()
        for depths, end in (([1, 4, 7, 2], 3), ([6, 1, 2, 3], 4), ([2, 2, 9, 1], T)):
            now = slice(left.length, end)
            first = model(ids[:, now], 9, left, left.length, exit_rule=LeaveAfter(depths))
            second = model(ids[:, now], depths, told, told.length)
            assert_same(first, second, tolerance=1e-6)

    def test_no_exits(self, model):
        ids = random_ids(B, T)
        assert_same(
            full(model, ids, 5, exit_rule=LeaveAfter([99] * B)), full(model, ids, 5), tolerance=1e-6
        )

    def test_a_row_never_exceeds_its_depth(self, model):
        ids, trace = random_ids(B, T), LoopTrace()
        full(model, ids, [1, 4, 4, 4], exit_rule=LeaveAfter([9, 9, 9, 2]), trace=trace)
        assert trace.active[1].rows.tolist() == [1, 2, 3]
        assert trace.exits.tolist() == [[1] * T, [4] * T, [4] * T, [2] * T]

    def test_states_of_before_and_after(self, model):
        ids, trace, rule = random_ids(B, T), LoopTrace(keep_states=True), LeaveAfter([99] * B)
        full(model, ids, 3, exit_rule=rule, trace=trace)
        for t, look in enumerate(rule.looks):
            assert look.t == t
            assert torch.equal(look.after_BTD, trace.states[t])
            before = trace.states[t - 1] if t else torch.zeros_like(look.before_BTD)
            assert torch.equal(look.before_BTD, before)


def gradients(model: OpenMythos, forward: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    logits = forward()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weights).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class TestTruncatedGradients:
    def by_hand(self, model: OpenMythos, ids: Tensor, n_loops: list[int], k: int) -> Tensor:
        """Row by row, the state cut off by ``detach`` before the last ``k`` loops."""
        logits = []
        for row, depth in enumerate(n_loops):
            ctx = model.context(ids[row : row + 1])
            e = model.embed(ids[row : row + 1], ctx)
            h = model.recurrent.initial_state(e, ctx)
            for t in range(depth):
                if t == depth - k > 0:  # a row of k loops or fewer is not truncated at all
                    h = h.detach()
                h = model.step(h, e, t, ctx)
            logits.append(model.logits(h, ctx))
        return torch.cat(logits)

    def test_an_exit_rule_has_no_gradients(self, attn_type):
        with pytest.raises(ConfigError, match="grad_loops"):
            small_model(attn_type)(random_ids(B, T), exit_rule=FixedDepth(2), grad_loops=1)

    @pytest.mark.parametrize("n_loops", [[5, 5, 5, 5], [1, 7, 2, 4]], ids=str)
    @pytest.mark.parametrize("k", [1, 2, 5])
    @pytest.mark.parametrize("initial_state", ["zero", "prelude"])
    def test_equals_a_manual_detach(self, attn_type, n_loops, k, initial_state):
        model, ids = small_model(attn_type, initial_state=initial_state), random_ids(B, T)
        fast = gradients(model, lambda: model(ids, n_loops, grad_loops=k))
        slow = gradients(model, lambda: self.by_hand(model, ids, n_loops, k))
        assert fast.keys() == slow.keys()
        for name, gradient in slow.items():
            torch.testing.assert_close(fast[name], gradient, rtol=1e-3, atol=1e-4, msg=name)

    def test_more_than_all_loops_is_all_loops(self, model):
        ids = random_ids(B, T)
        assert torch.equal(
            gradients(model, lambda: model(ids, 3, grad_loops=3))["embedding.weight"],
            gradients(model, lambda: model(ids, 3))["embedding.weight"],
        )

    def test_truncation_changes_gradients_not_logits(self, model):
        ids = random_ids(B, T)
        torch.testing.assert_close(model(ids, 5, grad_loops=1), model(ids, 5))
        cut = gradients(model, lambda: model(ids, 5, grad_loops=1))["embedding.weight"]
        whole = gradients(model, lambda: model(ids, 5))["embedding.weight"]
        assert_differs(cut, whole)

    def test_early_loops_keep_no_graph(self, model):
        ids, graph = random_ids(B, T), []
        block = model.recurrent.blocks[0]
        hook = block.register_forward_hook(lambda *args: graph.append(args[2].requires_grad))
        model(ids, [6, 6, 4, 2], grad_loops=2)
        hook.remove()
        assert graph == [True, True, True, True, True, True]  # the shallow row needs loops 0 and 1
        graph.clear()
        hook = block.register_forward_hook(lambda *args: graph.append(args[2].requires_grad))
        model(ids, 6, grad_loops=2)
        hook.remove()
        assert graph == [False, False, False, False, True, True]

    def test_without_autograd(self, model):
        with torch.no_grad():
            assert not model(random_ids(B, T), 4, grad_loops=2).requires_grad


class TestInitialState:
    def state(self, model: OpenMythos, ids: Tensor, seeds: Tensor | None = None) -> Tensor:
        ctx = model.context(ids, sample_seeds=seeds)
        return model.recurrent.initial_state(model.embed(ids, ctx), ctx)

    def test_zero(self, model):
        assert not self.state(model, random_ids(B, T)).any()

    def test_prelude_is_the_encoded_input(self):
        model = small_model(initial_state="prelude")
        ids = random_ids(B, T)
        assert torch.equal(self.state(model, ids), model.embed(ids))

    def test_normal_is_truncated_with_variance_two_fifths(self):
        model = OpenMythos(small_config(initial_state="normal", max_seq_len=512))
        h = self.state(model, random_ids(8, 512), torch.arange(8))
        assert h.dtype == torch.float32
        assert h.mean().item() == pytest.approx(0, abs=0.005)
        assert h.var().item() == pytest.approx(0.4 * 0.9733, rel=0.01)  # truncation at 3 sigma
        assert h.abs().max() <= 3 * 0.4**0.5

    def test_normal_belongs_to_a_sequence_and_a_position(self):
        """The same in a batch or alone, whole or in chunks, and with padding in front."""
        model = small_model(initial_state="normal")
        ids, seeds = random_ids(3, T), torch.tensor([5, 1 << 50, 7])
        h = self.state(model, ids, seeds)
        assert_differs(h[0], h[1])
        assert_differs(h[:, 0], h[:, 1])
        assert torch.equal(self.state(model, ids[1:2], seeds[1:2]), h[1:2])
        cache = KVCache()
        for now in (slice(0, 2), slice(2, T)):
            ctx = model.context(ids[:, now], cache, now.start, sample_seeds=seeds)
            part = model.recurrent.initial_state(model.embed(ids[:, now]), ctx)
            assert torch.equal(part, h[:, now])
            cache.commit(ctx.columns)
        padded = torch.cat((ids[:, :2], ids), 1)
        mask = torch.ones_like(padded, dtype=torch.bool)
        mask[:, :2] = False
        ctx = model.context(padded, attention_mask=mask, sample_seeds=seeds)
        assert torch.equal(model.recurrent.initial_state(model.embed(padded), ctx)[:, 2:], h)

    def test_normal_is_not_the_noise_of_dropout(self):
        """Each use of a sequence's key has a salt of its own."""
        from open_mythos.ops.random import counter_normal

        model = small_model(initial_state="normal")
        seeds = torch.arange(B)
        h = self.state(model, random_ids(B, T), seeds)
        for salt in range(64):
            noise = counter_normal(seeds, torch.arange(T), 32, salt)
            assert torch.corrcoef(torch.stack((h.flatten(), noise.flatten())))[0, 1].abs() < 0.2

    def test_cached_equals_whole(self, attn_type):
        model = small_model(attn_type, initial_state="normal")
        ids, seeds, cache = random_ids(B, T), torch.arange(B) + 3, KVCache()
        parts = [model(ids[:, i : i + 1], 5, cache, i, sample_seeds=seeds) for i in range(T)]
        assert_same(torch.cat(parts, 1), full(model, ids, 5, sample_seeds=seeds))
        assert_differs(full(model, ids, 1, sample_seeds=seeds), full(model, ids, 1))


class TestBeyondTheTrainedDepth:
    def step(self, model: OpenMythos, t: int) -> Tensor:
        h, e = torch.randn(2, B, T, 32, generator=torch.Generator().manual_seed(0))
        return model.step(h, e, t).detach()

    @pytest.mark.parametrize(
        "parts", [{"lora_rank": 3}, {"lora_rank": 0, "loop_embedding": True}], ids=str
    )
    def test_adapter_and_embedding_saturate(self, attn_type, parts):
        model = small_model(attn_type, **parts)
        last = self.step(model, 3)
        for t in (4, 5, 63):
            assert torch.equal(self.step(model, t), last)
        for t in (0, 1, 2):
            assert_differs(self.step(model, t), last)

    def test_without_them_all_loops_are_alike(self, attn_type):
        model = small_model(attn_type, lora_rank=0)
        assert model.recurrent.lora is None
        assert torch.equal(self.step(model, 0), self.step(model, 7))


class TestManyLoops:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_state_is_bounded_after_1024_loops(self, attn_type, dtype):
        """From random weights: the second half of the loops does not grow over the first."""
        model, trace = small_model(attn_type, n_experts=0).to(dtype), LoopTrace()
        full(model, random_ids(1, 3), 1024, trace=trace)
        norms = torch.cat([trace.state_norm[t] for t in range(1024)])
        assert norms.isfinite().all()
        assert norms[512:].max() < 1.5 * norms[:512].max()


class TestShared:
    """What loops share is computed once per call without gradient, and never outlives the call."""

    @pytest.mark.parametrize("rule", [None, LeaveAfter([5, 3])])
    def test_decay_is_computed_once(self, model, monkeypatch, rule):
        injection, calls = model.recurrent.injection, []
        decay = injection.decay
        monkeypatch.setattr(injection, "decay", lambda: calls.append(1) or decay())
        ids = random_ids(2, T)
        with torch.no_grad():
            once = model(ids, 5, exit_rule=rule)
        assert len(calls) == 1
        monkeypatch.setattr(model.recurrent, "sharing", lambda ctx: ctx)
        with torch.no_grad():
            assert torch.equal(model(ids, 5, exit_rule=rule), once)
        assert len(calls) == 1 + 5

    def test_a_call_sees_the_weights_of_now(self, attn_type):
        model = small_model(attn_type)
        block, ids = model.recurrent, random_ids(2, T)
        with torch.no_grad():
            ctx = model.context(ids)
            e = model.embed(ids, ctx)
            before = block(e, ctx, Depth(3))
            block.injection.log_A.data.add_(0.5)  # counted by no version
            after = block(e, ctx, Depth(3))
            assert_differs(after, before)
            assert torch.equal(after, block(e, model.context(ids), Depth(3)))
            h = block.step(before, block.injection.drive(e), 0, ctx)
            assert torch.equal(
                h, block.step(before, block.injection.drive(e), 0, model.context(ids))
            )
        block.step(before, block.injection.drive(e), 0, block.sharing(ctx)).sum().backward()
        assert block.injection.log_A.grad.abs().sum() > 0

    def test_a_context_may_be_shared_by_steps(self, model):
        block, ids = model.recurrent, random_ids(2, T)
        with torch.no_grad():
            ctx = model.context(ids)
            e = model.embed(ids, ctx)
            drive, shared = block.injection.drive(e), block.sharing(ctx)
            assert torch.equal(block.step(e, drive, 1, shared), block.step(e, drive, 1, ctx))


class TestStep:
    def test_linear_part(self, attn_type):
        """With every branch at zero a loop is exactly A h + B e."""
        block = RecurrentBlock(small_config(attn_type))
        for name, value in block.named_parameters():
            if name.endswith(("out_proj.weight", "down.weight", "ffn.down", "lora.up")):
                torch.nn.init.zeros_(value)
        torch.nn.init.normal_(block.injection.B)
        h, e = torch.randn(2, B, T, 32)
        ctx = OpenMythos(small_config(attn_type)).context(random_ids(B, T))
        after = block.step(h, block.injection.drive(e), 0, ctx)
        torch.testing.assert_close(after, block.injection(h, e))

    def test_dense_loop(self, attn_type):
        model = small_model(attn_type, n_experts=0)
        trace = LoopTrace()
        assert model(random_ids(B, T), 3, trace=trace).shape == (B, T, 61)
        assert not trace.load

    def test_state_stays_float32_in_a_bfloat16_model(self, attn_type):
        model = small_model(attn_type).bfloat16()
        trace = LoopTrace(keep_states=True)
        logits = full(model, random_ids(B, T), 3, trace=trace)
        assert logits.dtype == torch.bfloat16
        assert all(state.dtype == torch.float32 for state in trace.states.values())

    def test_bfloat16_is_close_to_float32(self, attn_type):
        ids = random_ids(B, T)
        exact = full(small_model(attn_type), ids, 4)
        half = full(small_model(attn_type).bfloat16(), ids, 4).float()
        assert (half - exact).abs().mean() < 0.2 * exact.std()
