"""The model around the loop: modes, dropout, types, ties, devices, balance of experts."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_differs, assert_same, random_ids, randomise, small_config, small_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from open_mythos import ConfigError, Depth, LoopTrace, OpenMythos, exit_rule, mythos_nano

B, T = 3, 7


@torch.no_grad()
def full(model: OpenMythos, ids: Tensor, n_loops: int | list[int] = 4, **arguments) -> Tensor:
    return model(ids, n_loops, **arguments)


class TestParts:
    def test_logits_are_head_of_hidden(self, model):
        ids = random_ids(B, T)
        hidden = model.hidden(ids, model.context(ids), Depth(4))
        assert hidden.shape == (B, T, 32)
        assert_same((hidden @ model.head.weight.T).detach(), full(model, ids))

    def test_every_parameter_matters(self, model):
        """No dead weight: all but the gate, which reads the loop and does not steer it."""
        model.zero_grad()
        model(random_ids(B, 32), [2, 4, 9]).square().mean().backward()
        for name, parameter in model.named_parameters():
            if ".halting." in name:
                assert parameter.grad is None
            else:
                assert parameter.grad.abs().sum() > 0, name

    @pytest.mark.parametrize(
        "change",
        [
            {"prelude_layers": 0}, {"coda_layers": 0}, {"recurrent_layers": 3}, {"readout": False},
            {"prelude_norm": False}, {"n_shared_experts": 0}, {"lora_rank": 0}, {"n_experts": 0},
            {"q_lora_rank": 0}, {"injection_matrix": "diagonal"}, {"injection_rule": "euler"},
            {"loop_embedding": True}, {"tie_embeddings": True}, {"norm_eps": 0.5}, {"ffn_dim": 9},
            {"initial_state": "prelude"}, {"rope_theta": 30.0}, {"n_experts_per_tok": 8},
        ],
        ids=str,
    )  # fmt: skip
    def test_every_field_changes_the_model(self, change):
        """The smallest model that differs in one field gives other logits."""
        ids = random_ids(B, T)
        torch.manual_seed(0)
        changed = full(small_model(**change), ids)
        torch.manual_seed(0)
        assert_differs(changed, full(small_model(), ids))

    def test_tied_embeddings_are_one_parameter(self):
        model = small_model(tie_embeddings=True)
        assert model.head.weight is model.embedding.weight
        names = [name for name, _ in model.named_parameters()]
        assert "head.weight" not in names

    def test_without_a_head(self, attn_type):
        """The states are those of a whole model, exit rules that predict included."""
        whole = small_model(attn_type)
        core = OpenMythos(whole.cfg, head=False).eval()
        state = {k: v for k, v in whole.state_dict().items() if k != "head.weight"}
        core.load_state_dict(state)
        ids, rule = random_ids(B, T), exit_rule("kl:0.5,3", whole)
        with torch.no_grad():
            want = whole.hidden(ids, whole.context(ids), Depth(4))
            assert torch.equal(core.hidden(ids, core.context(ids), Depth(4)), want)
            want = whole.hidden(ids, whole.context(ids), Depth(4, rule))

            def read_out(h, ctx, t):
                return whole.head(core.final_hidden(h, ctx, t))

            got = core.hidden(ids, core.context(ids), Depth(4, rule), read_out=read_out)
        assert torch.equal(got, want)

    def test_embeddings_take_the_place_of_ids(self, attn_type):
        model = small_model(attn_type, embedding_scale=1.7)
        ids = random_ids(B, T)
        assert torch.equal(full(model, model.embedding(ids)), full(model, ids))
        with pytest.raises(ConfigError, match="embeddings"):
            model(torch.zeros(B, T, 31))

    def test_int32_ids(self, model):
        ids = random_ids(B, T)
        assert torch.equal(full(model, ids.int()), full(model, ids))

    def test_meta_device(self):
        with torch.device("meta"):
            model = OpenMythos(mythos_nano())
        assert all(parameter.is_meta for parameter in model.parameters())

    def test_state_dict_has_no_tables(self, model):
        """Rotary tables are rebuilt, never stored; the only buffer is the balance of experts."""
        parameters = {name for name, _ in model.named_parameters()}
        assert set(model.state_dict()) - parameters == {"recurrent.blocks.0.ffn.router_bias"}

    def test_state_dict_round_trip(self, attn_type):
        first, second = small_model(attn_type, seed=1), small_model(attn_type, seed=2)
        ids = random_ids(B, T)
        assert_differs(full(first, ids), full(second, ids))
        second.load_state_dict(first.state_dict())
        assert torch.equal(full(first, ids), full(second, ids))


class TestDropout:
    def train(self, attn_type: str, **changes: object) -> OpenMythos:
        return small_model(attn_type, dropout=0.3, **changes).train()

    def test_off_in_evaluation(self, attn_type):
        ids = random_ids(B, T)
        quiet = self.train(attn_type).eval()
        assert torch.equal(full(quiet, ids), full(small_model(attn_type), ids))

    def test_a_mask_belongs_to_its_sequence(self, attn_type):
        """The same in a batch or alone, and with padding in front."""
        model, ids, seeds = self.train(attn_type), random_ids(B, T), torch.tensor([4, 9, 1 << 45])
        batch = full(model, ids, [2, 5, 5], sample_seeds=seeds)
        for row, depth in enumerate([2, 5, 5]):
            own = slice(row, row + 1)
            alone = full(model, ids[own], depth, sample_seeds=seeds[own])
            assert_same(batch[own], alone)
        padded, mask = torch.cat((ids[:, :3], ids), 1), torch.ones(B, T + 3, dtype=torch.bool)
        mask[:, :3] = False
        shifted = full(model, padded, [2, 5, 5], sample_seeds=seeds, attention_mask=mask)
        assert_same(shifted[:, 3:], batch)

    def test_another_seed_is_another_mask(self, attn_type):
        model, ids = self.train(attn_type), random_ids(1, T).expand(B, T)
        logits = full(model, ids, sample_seeds=torch.tensor([1, 2, 1]))
        assert torch.equal(logits[0], logits[2]) or assert_same(logits[0], logits[2]) is None
        assert_differs(logits[0], logits[1])

    def test_without_seeds_it_follows_the_global_generator(self, attn_type):
        model, ids, runs = self.train(attn_type), random_ids(B, T), []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(full(model, ids))
        assert torch.equal(runs[0], runs[1])
        assert_differs(runs[2], runs[0])

    @pytest.mark.parametrize("autocast", [False, True])
    def test_recomputation_sees_the_same_mask(self, attn_type, autocast):
        """Gradients under activation checkpointing of every loop equal those without it."""
        model, ids = self.train(attn_type), random_ids(B, T)
        step, runs = model.recurrent.step, []
        for recompute in (False, True):
            if recompute:
                model.recurrent.step = lambda *args: checkpoint(step, *args, use_reentrant=False)
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                model(
                    ids, [2, 5, 5], sample_seeds=torch.arange(B)
                ).float().square().sum().backward()
            runs.append(
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            )
        assert runs[0].keys() == runs[1].keys()
        for name, gradient in runs[0].items():
            torch.testing.assert_close(runs[1][name], gradient, rtol=1e-4, atol=1e-4)

    def test_every_site_and_loop_draws_its_own(self, attn_type):
        """Control: the masks of two loops, two layers and two branches differ."""
        block = self.train(attn_type).recurrent.blocks[0]
        ctx = self.train(attn_type).context(random_ids(1, T), sample_seeds=torch.tensor([3]))
        ones = torch.ones(1, T, 32)
        masks = [block._drop(ones, ctx, loop, site) for loop in (0, 1) for site in (0, 1)]
        block.layer += 1
        masks.append(block._drop(ones, ctx, 0, 0))
        for i, first in enumerate(masks):
            assert 0.6 < (first > 0).float().mean() < 0.8
            assert not any(torch.equal(first, second) for second in masks[:i])


class TestTypes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_whole_model_in_another_type(self, attn_type, dtype):
        model, ids = small_model(attn_type).to(dtype), random_ids(B, T)
        logits = full(model, ids)
        assert logits.dtype == dtype
        error = (logits.float() - full(small_model(attn_type), ids)).abs().mean()
        assert error < (1e-3 if dtype == torch.float64 else 0.2)

    def test_autocast(self, attn_type):
        model, ids = small_model(attn_type), random_ids(B, T)
        trace = LoopTrace(keep_states=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids, 4, trace=trace)
            loss = logits.float().square().mean()
        loss.backward()
        assert logits.dtype == torch.bfloat16
        assert trace.states[3].dtype == torch.float32
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
        assert (logits.float() - full(model, ids)).abs().mean() < 0.2

    def test_decay_stays_below_one_in_every_type(self, attn_type):
        for dtype in (torch.bfloat16, torch.float16):
            model = small_model(attn_type)
            torch.nn.init.constant_(model.recurrent.injection.log_A, -20.0)
            model = model.to(dtype)
            assert model.recurrent.injection.get_A().dtype == torch.float32
            assert model.recurrent.injection.spectral_radius() == 0.99609375


class TestBackends:
    def test_attention(self, attn_type):
        ids = random_ids(B, T)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        logits = [
            full(small_model(attn_type, attn_backend=name), ids, [1, 4, 6], attention_mask=mask)
            for name in ("reference", "sdpa", "auto")
        ]
        assert_same(logits[1], logits[0])
        assert_same(logits[2], logits[0])

    @pytest.mark.parametrize("expert_dim", [16, 15])
    def test_experts(self, expert_dim):
        ids = random_ids(B, T)
        names = ("reference", "sorted", "auto", "grouped")[: 4 if expert_dim == 16 else 3]
        models = [small_model(moe_backend=name, expert_dim=expert_dim) for name in names]
        logits = [full(model, ids) for model in models]
        for other in logits[1:]:
            assert_same(other, logits[0])


class TestRouterBalance:
    def test_update_uses_the_load_of_all_loops(self, model):
        model = randomise(OpenMythos(small_config(model.cfg.attn_type)))
        trace = LoopTrace()
        model(random_ids(B, T), 5, trace=trace)
        ffn = model.recurrent.blocks[0].ffn
        before, load = ffn.router_bias.clone(), trace.load_by_loop(1).sum(0)
        model.update_router_bias(trace, 0.01)
        expected = before + 0.01 * (load.mean() - load).sign()
        torch.testing.assert_close(ffn.router_bias, expected)

    def test_bias_evens_out_the_load_of_a_model(self):
        """A skewed router and no gradient: the bias alone brings every expert near its share."""
        model, ids = small_model(), random_ids(16, 16)
        ffn = model.recurrent.blocks[0].ffn
        with torch.no_grad():
            ffn.router_bias.zero_()
            ffn.router.weight.mul_(1.5)
        loads = []
        for _ in range(150):
            trace = LoopTrace()
            full(model, ids, 3, trace=trace)
            loads.append(trace.load_by_layer()[1])
            model.update_router_bias(trace, 0.01)
        first, last = (load / load.mean() for load in (loads[0], sum(loads[-20:])))
        assert first.max() > 1.5
        assert last.max() < 1.15
        assert last.min() > 0.85


def test_a_cached_call_in_training_mode_keeps_no_graph(attn_type):
    model = small_model(attn_type, dropout=0.1).train()
    assert not model(random_ids(B, T), 2, {}).requires_grad


def test_a_plain_call_consumes_no_randomness(model):
    state = torch.get_rng_state()
    full(model, random_ids(B, T))
    assert torch.equal(torch.get_rng_state(), state)
