"""The classes of transformers compute what the core computes, in every way they are called."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_differs, assert_same, random_ids, small_model
from transformers import AutoModel, DynamicCache, GenerationConfig, StaticCache

from open_mythos import ConfigError, Depth, KVCache, exit_rule
from open_mythos.hf import OpenMythosConfig, OpenMythosForCausalLM, from_native, register, to_native

B, T, LOOPS = 2, 9, 3


def wrap(native, **settings) -> OpenMythosForCausalLM:
    """The class around the same weights."""
    outer = from_native(native).eval()
    for name, value in settings.items():
        setattr(outer.config, name, value)
    return outer


@pytest.fixture
def outer(model):
    return wrap(model)


@torch.no_grad()
def native_logits(model, ids, n_loops=LOOPS, **arguments):
    return model(ids, n_loops, **arguments)


@torch.no_grad()
def logits(outer, ids=None, n_loops=LOOPS, **arguments):
    return outer(ids, n_loops=n_loops, **arguments).logits


@torch.no_grad()
def by_token(outer, ids, n_loops, cache, first=5, mask=None):
    """Logits of a prompt of ``first`` tokens and then of one token at a time."""
    parts, start = [], 0
    for end in range(first, ids.shape[1] + 1):
        given = {} if mask is None else {"attention_mask": mask[:, :end]}
        out = outer(ids[:, start:end], n_loops=n_loops, past_key_values=cache, **given)
        parts, start = [*parts, out.logits], end
    return torch.cat(parts, 1)


def greedy(outer, ids, new=6, n_loops=LOOPS, **arguments):
    if ids is not None:  # else it is guessed from where the padding token occurs
        arguments.setdefault("attention_mask", torch.ones_like(ids))
    return outer.generate(
        ids, max_new_tokens=new, do_sample=False, n_loops=n_loops, pad_token_id=0, **arguments
    )


def native_greedy(model, ids, new=6, n_loops=LOOPS, **arguments):
    return model.generate(ids, new, n_loops, temperature=0, **arguments)


class TestForward:
    def test_is_the_core(self, model, outer):
        ids = random_ids(B, T)
        assert torch.equal(logits(outer, ids), native_logits(model, ids))
        assert torch.equal(logits(outer, ids, [1, 4]), native_logits(model, ids, [1, 4]))
        depths = torch.tensor([4, 2])
        assert torch.equal(logits(outer, ids, depths), native_logits(model, ids, [4, 2]))

    def test_default_depth(self, model):
        ids = random_ids(B, T)
        assert torch.equal(logits(wrap(model), ids, None), native_logits(model, ids, 4))
        assert torch.equal(logits(wrap(model, n_loops=2), ids, None), native_logits(model, ids, 2))

    def test_embeddings(self, outer):
        ids = random_ids(B, T)
        embeddings = outer.get_input_embeddings()(ids)
        assert torch.equal(logits(outer, inputs_embeds=embeddings), logits(outer, ids))

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, model, outer, side):
        """A padded row has the logits of the row alone; positions may be given or not."""
        ids, mask = random_ids(B, T), torch.ones(B, T, dtype=torch.long)
        hidden = slice(0, 3) if side == "left" else slice(T - 3, T)
        mask[1, hidden] = 0
        alone = native_logits(model, ids[1:, 3:] if side == "left" else ids[1:, :-3])
        kept = slice(3, None) if side == "left" else slice(None, -3)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        for arguments in ({}, {"position_ids": positions}):
            got = logits(outer, ids, attention_mask=mask, **arguments)
            assert_same(got[1:, kept], alone)

    def test_packed_rows(self, model, outer):
        """Positions that start again begin a document."""
        one, two = random_ids(1, 4, seed=1), random_ids(1, 5, seed=2)
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
        got = logits(outer, torch.cat([one, two], 1), position_ids=positions)
        apart = [native_logits(model, each) for each in (one, two)]
        assert_same(got, torch.cat(apart, 1))

    def test_packed_rows_may_be_longer_than_the_context(self, model, outer):
        one, n = random_ids(1, 40), model.cfg.max_seq_len
        positions = torch.arange(40).repeat(2)[None]
        got = logits(outer, one.repeat(1, 2), position_ids=positions)
        assert got.shape[1] > n
        assert_same(got[:, 40:], native_logits(model, one))
        longer = torch.cat([torch.arange(n + 1), torch.arange(3)])[None]
        with pytest.raises(ConfigError, match="context"):
            logits(outer, random_ids(1, n + 4), position_ids=longer)

    def test_positions_are_relative(self, outer):
        ids = random_ids(B, T)
        later = torch.arange(T)[None] + 7
        assert_same(logits(outer, ids, position_ids=later), logits(outer, ids))
        sparse = 2 * torch.arange(T).expand(B, T)
        mask = torch.ones(B, T)
        mask[0, 0] = 0  # padding: the positions are no documents
        got = logits(outer, ids, position_ids=sparse, attention_mask=mask)
        assert_differs(got, logits(outer, ids, attention_mask=mask))

    def test_logits_to_keep(self, outer):
        ids = random_ids(B, T)
        whole = logits(outer, ids)
        assert torch.equal(logits(outer, ids, logits_to_keep=2), whole[:, -2:])
        some = torch.tensor([0, 4])
        assert torch.equal(logits(outer, ids, logits_to_keep=some), whole[:, some])

    def test_loss(self, outer):
        """Labels are not shifted; -100 counts nothing."""
        ids = random_ids(B, T)
        labels = ids.clone()
        labels[0, :4] = -100
        out = outer(ids, labels=labels, n_loops=LOOPS)
        want = torch.nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        torch.testing.assert_close(out.loss, want)

    def test_scale_and_cap_of_logits(self, attn_type):
        native = small_model(attn_type, logit_scale=0.5, logit_softcap=1.5, embedding_scale=2.0)
        ids = random_ids(B, T)
        assert torch.equal(logits(wrap(native), ids), native_logits(native, ids))

    def test_states(self, model, outer):
        ids = random_ids(B, T)
        out = outer(ids, n_loops=LOOPS, output_loop_states=True, output_hidden_states=True)
        for got, (_, want) in zip(out.loop_states, model.unroll(ids, LOOPS), strict=True):
            assert torch.equal(got, want)
        assert len(out.hidden_states) == LOOPS + 1
        assert torch.equal(outer.lm_head(out.hidden_states[-1]), out.logits)
        assert len(outer(ids, n_loops=2, output_router_scores=True).router_scores) == 2
        assert outer(ids, n_loops=2).loop_states is None

    def test_tuples(self, outer):
        ids = random_ids(B, T)
        first, *_ = outer(ids, n_loops=LOOPS, return_dict=False)
        assert torch.equal(first, outer(ids, n_loops=LOOPS).logits)

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ({"attention_mask": torch.ones(B, 1, T, T)}, "mask"),
            ({"position_ids": torch.arange(T + 1)[None]}, "positions"),
            ({"output_attentions": True}, "never materialized"),
            ({"use_cache": True}, "no gradient"),
            ({"past_key_values": [1]}, "not one cache"),
            ({"inputs_embeds": torch.zeros(B, T, 32)}, "not one input"),
            ({"n_loops": 0}, "loops"),
            ({"n_loop": 3}, "did you mean 'n_loops'"),
            ({"exit_rules": "gate"}, "did you mean 'exit_rule'"),
            ({"exit_rule": "gates"}, "exit rule"),
        ],
        ids=str,
    )
    def test_what_cannot_be_done_is_refused(self, outer, arguments, text):
        with pytest.raises(ConfigError, match=text):
            outer(random_ids(B, T), **arguments)


class TestCache:
    @pytest.mark.parametrize("depth", [1, 4, 7])
    @pytest.mark.parametrize("kind", ["empty", "dynamic", "static"])
    def test_decoding_equals_the_whole(self, model, outer, kind, depth):
        ids = random_ids(B, T)
        cache = {
            "empty": DynamicCache,
            "dynamic": lambda: DynamicCache(config=outer.config),
            "static": lambda: StaticCache(config=outer.config, max_cache_len=16),
        }[kind]()
        assert_same(by_token(outer, ids, depth, cache), native_logits(model, ids, depth))
        assert int(cache.get_seq_length()) == T

    @pytest.mark.parametrize("kv_share", ["none", "last"])
    @pytest.mark.parametrize("depths", [(5, 2), (2, 5)], ids=str)
    def test_other_depths_later(self, attn_type, kv_share, depths):
        """As the native cache: deeper slots are filled, shallower calls fill them."""
        native = small_model(attn_type, kv_share=kv_share)
        outer, ids, cache, held = wrap(native), random_ids(B, T), DynamicCache(), {}
        for start, end, n in ((0, 5, depths[0]), (5, 7, depths[1]), (7, 9, depths[0])):
            want = native_logits(native, ids[:, start:end], n, kv_cache=held, start_pos=start)
            with torch.no_grad():
                got = outer(ids[:, start:end], n_loops=n, cache=cache).logits
            assert torch.equal(got, want)

    def test_cropped_between_depths(self, model, outer):
        """What is removed is the newest of every slot, those of deeper loops too."""
        ids, cache, held = random_ids(B, T), DynamicCache(), KVCache()
        for start, end, n, cut in ((0, 5, 5, 0), (5, 8, 2, 2), (6, 9, 5, 0)):
            want = native_logits(model, ids[:, start:end], n, kv_cache=held, start_pos=start)
            with torch.no_grad():
                got = outer(ids[:, start:end], n_loops=n, cache=cache).logits
            assert torch.equal(got, want)
            cache.crop(-cut)
            held.truncate(end - cut)

    def test_rows_of_their_own_depth(self, model, outer):
        ids, depths = random_ids(B, T), torch.tensor([2, 5])
        got = by_token(outer, ids, depths, DynamicCache())
        for row in range(B):
            assert_same(got[row : row + 1], native_logits(model, ids[row : row + 1], depths[row]))

    def test_padding(self, model, outer):
        ids, mask = random_ids(B, T), torch.ones(B, T, dtype=torch.long)
        mask[1, :3] = 0
        got = by_token(outer, ids, LOOPS, DynamicCache(), mask=mask)
        assert_same(got[1:, 3:], native_logits(model, ids[1:, 3:]))

    def test_the_installed_version_names_it(self, outer):
        with torch.no_grad():
            out = outer(random_ids(B, T), n_loops=1, use_cache=True)
        assert int(out.past_key_values.get_seq_length()) == T
        with torch.no_grad():
            assert outer(random_ids(B, T), n_loops=1).past_key_values is None

    def test_latents_stay_latent(self):
        outer, cache = wrap(small_model("mla")), DynamicCache()
        with torch.no_grad():
            outer(random_ids(B, T), n_loops=LOOPS, past_key_values=cache)
        assert len(cache.layers) == 2 + LOOPS
        assert {tuple(x.keys.shape) for x in cache.layers} == {(B, 1, T, 24)}
        assert {x.values.numel() for x in cache.layers} == {0}

    def test_refusals(self, outer):
        cache = StaticCache(config=outer.config, max_cache_len=4)
        with torch.no_grad(), pytest.raises(ConfigError, match="full"):
            outer(random_ids(B, T), past_key_values=cache)
        used = DynamicCache()
        with torch.no_grad():
            outer(random_ids(B, T), n_loops=1, past_key_values=used)
            with pytest.raises(ConfigError, match="another batch"):
                outer(random_ids(1, 1), n_loops=1, past_key_values=used)
            with pytest.raises(ConfigError, match="predicts"):
                outer(random_ids(B, T), exit_rule="stable", past_key_values=DynamicCache())
        offloaded = DynamicCache()
        offloaded.offloading = True
        with torch.no_grad(), pytest.raises(ConfigError, match="offloaded"):
            outer(random_ids(B, T), past_key_values=offloaded)


class TestGenerate:
    def test_tokens_are_native(self, model, outer):
        ids = random_ids(B, T)
        want = native_greedy(model, ids)
        assert torch.equal(greedy(outer, ids), want)
        assert torch.equal(greedy(outer, ids, use_cache=False), want)
        assert torch.equal(greedy(outer, ids, cache_implementation="static"), want)
        assert torch.equal(greedy(outer, ids, prefill_chunk_size=4), want)

    @pytest.mark.parametrize("kind", [None, "static"])
    def test_left_padding_and_depths_per_row(self, model, outer, kind):
        ids, mask = random_ids(B, T), torch.ones(B, T, dtype=torch.long)
        mask[1, :4] = 0
        settings = {"attention_mask": mask, "cache_implementation": kind}
        got = greedy(outer, ids, n_loops=[1, 4], **settings)
        for row, n_loops in enumerate([1, 4]):
            real = ids[row : row + 1, mask[row].bool()]
            want = native_greedy(model, real, n_loops=n_loops)
            assert got[row, T:].tolist() == want[0, real.shape[1] :].tolist()

    def test_embeddings(self, outer):
        ids = random_ids(B, T)
        embeddings = outer.get_input_embeddings()(ids)
        got = greedy(outer, None, inputs_embeds=embeddings)
        assert torch.equal(got, greedy(outer, ids)[:, T:])

    def test_beams(self, model, outer):
        """The best of 3 beams, found by scoring whole sequences."""
        ids = random_ids(1, 4)
        beams = [(0.0, ids)]
        for _ in range(4):
            grown = []
            for score, row in beams:
                chances = native_logits(model, row)[0, -1].log_softmax(-1)
                best = chances.topk(6)
                grown += [
                    (score + float(value), torch.cat([row, token.view(1, 1)], 1))
                    for value, token in zip(*best, strict=True)
                ]
            beams = sorted(grown, key=lambda beam: -beam[0])[:3]
        assert torch.equal(greedy(outer, ids, new=4, num_beams=3), beams[0][1])

    def test_assisted(self, model, outer):
        """Drafts of one loop, of which the model keeps what it would have said itself."""
        ids = random_ids(1, T)
        draft = copy.deepcopy(outer)
        draft.config.n_loops = 1
        want = native_greedy(model, ids, 12)
        assert torch.equal(greedy(outer, ids, 12, assistant_model=draft), want)
        assert torch.equal(greedy(outer, ids, 12, prompt_lookup_num_tokens=3), want)

    def test_a_draft_has_its_own_depth(self, outer, monkeypatch):
        depths = []
        inner = outer.model.core.recurrent.forward

        def forward(e, ctx, depth, **arguments):
            depths.append(depth.n_loops)
            return inner(e, ctx, depth, **arguments)

        draft = copy.deepcopy(outer)
        draft.config.n_loops = 1
        monkeypatch.setattr(draft.model.core.recurrent, "forward", forward)
        greedy(outer, random_ids(1, T), 4, assistant_model=draft)
        assert set(depths) == {1}

    @pytest.mark.parametrize("rule", ["fixed:2", "gate:0.4", "change:0.4", "acceleration:0.5"])
    def test_exits_are_native(self, model, outer, rule):
        ids = random_ids(B, T)
        want = native_greedy(model, ids, exit_rule=exit_rule(rule, model))
        assert torch.equal(greedy(outer, ids, exit_rule=rule), want)
        with torch.no_grad():
            loops = outer(ids, n_loops=LOOPS, exit_rule=rule).exit_loops
        assert loops.shape == (B, T)
        assert loops.max() <= LOOPS

    def test_rules_that_predict_need_no_cache(self, model, outer):
        ids = random_ids(B, T)
        with pytest.raises(ConfigError, match="use_cache=False"):
            greedy(outer, ids, exit_rule="kl:0.1")
        want = native_greedy(model, ids, exit_rule=exit_rule("kl:0.1", model))
        assert torch.equal(greedy(outer, ids, exit_rule="kl:0.1", use_cache=False), want)

    def test_who_says_the_depth(self, model, outer):
        """An argument, then the given configuration, then the model's two."""
        ids = random_ids(B, T)
        want = {n: native_greedy(model, ids, n_loops=n) for n in (1, 2, 3, 4)}
        assert len({tuple(x.flatten().tolist()) for x in want.values()}) == 4
        given = GenerationConfig(n_loops=2, max_new_tokens=6, do_sample=False, pad_token_id=0)

        def generate(**arguments):
            return outer.generate(ids, attention_mask=torch.ones_like(ids), **arguments)

        own = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(generate(**own), want[4])
        outer.config.n_loops = 3
        assert torch.equal(generate(**own), want[3])
        outer.generation_config.n_loops = 1
        assert torch.equal(generate(**own), want[1])
        assert torch.equal(generate(generation_config=given), want[2])
        assert torch.equal(generate(n_loops=4, **own), want[4])
        assert torch.equal(generate(generation_config=given, n_loops=4), want[4])

    def test_a_typo_is_refused(self, outer):
        with pytest.raises(ValueError, match="n_lops"):
            outer.generate(random_ids(B, T), n_lops=2, max_new_tokens=2, pad_token_id=0)


CHOICES = [
    {"prelude_layers": 0, "coda_layers": 0}, {"recurrent_layers": 2, "coda_layers": 2},
    {"kv_share": "last", "recurrent_layers": 2}, {"initial_state": "normal"},
    {"initial_state": "prelude", "injection": "none", "state_norm": "loop"},
    {"injection": "concat", "block_norms": "in+sum", "state_norm": "exit"},
    {"window": 4}, {"layer_overrides": {"1": {"window": 3, "rope_theta": 0}}},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"value_embedding": True}, {"n_experts": 0, "ffn_kind": "relu2"},
    {"qk_norm": "head", "qkv_bias": True, "attn_scale": 0.3},
]  # fmt: skip


@pytest.mark.parametrize("change", CHOICES, ids=str)
def test_every_choice_of_architecture(change):
    """Whole and by token, through the fields of the flat configuration."""
    native = small_model("gqa", **change)
    outer, ids = wrap(native), random_ids(B, T)
    again = OpenMythosConfig.from_dict(outer.config.to_dict())
    assert again.mythos() == outer.config.mythos()
    want = native_logits(native, ids)
    assert torch.equal(logits(outer, ids), want)
    held = {}
    parts = [native_logits(native, ids[:, :5], kv_cache=held)]
    for i in range(5, T):
        parts.append(native_logits(native, ids[:, i : i + 1], kv_cache=held, start_pos=i))
    cached = torch.cat(parts, 1)
    for cache in (DynamicCache(), StaticCache(config=outer.config, max_cache_len=12)):
        assert_same(by_token(outer, ids, LOOPS, cache), cached)


class TestParts:
    def test_configuration_has_every_field(self, model):
        config = OpenMythosConfig.of(model.cfg, n_loops=2)
        again = OpenMythosConfig.from_dict(config.to_dict())
        assert again.mythos() == config.mythos()
        assert config.hidden_size == model.cfg.dim
        assert config.num_hidden_layers == model.cfg.cache_slots(2)
        assert config.tie_word_embeddings is False
        want = model.cfg.to_dict()
        if model.cfg.attn_type == "gqa":  # other tools take this for latent attention
            assert config.kv_lora_rank is None
            want["kv_lora_rank"] = type(model.cfg)().kv_lora_rank
        assert config.mythos().to_dict() == want

    def test_round_trip(self, model, outer):
        ids = random_ids(B, T)
        assert torch.equal(native_logits(to_native(outer), ids), native_logits(model, ids))

    def test_tied_weights_are_one(self, attn_type):
        native = small_model(attn_type, tie_embeddings=True)
        outer = wrap(native)
        assert outer.lm_head.weight is outer.get_input_embeddings().weight
        assert to_native(outer).head.weight is not native.head.weight
        ids = random_ids(B, T)
        assert torch.equal(logits(outer, ids), native_logits(native, ids))

    @pytest.mark.parametrize("tie", [False, True])
    def test_resize(self, tie):
        outer = wrap(small_model(tie_embeddings=tie))
        ids = random_ids(B, T)
        before = logits(outer, ids)
        outer.resize_token_embeddings(70, mean_resizing=False)
        after = logits(outer, ids)
        assert after.shape == (B, T, 70)
        assert torch.equal(after[..., :61], before)
        assert (outer.lm_head.weight is outer.get_input_embeddings().weight) == tie
        logits(outer, torch.full((B, T), 69))

    def test_meta_device(self, model):
        config = OpenMythosConfig.of(model.cfg)
        with torch.device("meta"):
            assert all(p.is_meta for p in OpenMythosForCausalLM(config).parameters())

    def test_checkpointed_gradients_are_the_same(self, attn_type):
        outer = wrap(small_model(attn_type)).train()
        ids, grads = random_ids(B, T), []
        for enable in (False, True):
            outer._set_gradient_checkpointing(enable)
            assert outer.model.gradient_checkpointing == enable
            outer.zero_grad()
            outer(ids, labels=ids, n_loops=LOOPS, grad_loops=2).loss.backward()
            grads.append([p.grad.clone() for p in outer.parameters() if p.grad is not None])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    def test_base_class(self, model, outer):
        ids = random_ids(B, T)
        register()
        base = AutoModel.from_config(outer.config)
        assert type(base).__name__ == "OpenMythosModel"
        base.load_state_dict(outer.model.state_dict())
        with torch.no_grad():
            hidden = base.eval()(ids, n_loops=LOOPS).last_hidden_state
            want = model.hidden(ids, model.context(ids), Depth(LOOPS))
        assert torch.equal(hidden, want)
