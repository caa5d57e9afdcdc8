"""Generation: sampling, stop criteria, and independence of rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import random_ids, randomise, small_config, small_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from open_mythos import ByteTokenizer, ConfigError, DenseTransformer, Depth, OpenMythos
from open_mythos.config import MythosConfig
from open_mythos.inference.decoding import decoder_factory
from open_mythos.model.exit_rules import FixedDepth
from open_mythos.model.generation import StopStrings, generate
from open_mythos.ops.sampling import SamplingParams

B, T, NEW = 3, 5, 10


@torch.no_grad()
def greedy(model: OpenMythos, ids: Tensor, n_new: int, n_loops: int) -> Tensor:
    """Generate with a full forward call per token."""
    for _ in range(n_new):
        ids = torch.cat((ids, model(ids, n_loops)[:, -1].argmax(-1, keepdim=True)), 1)
    return ids


class TestTokens:
    @pytest.mark.parametrize("n_loops", [1, 4, 9])
    def test_greedy_is_the_plain_loop(self, model, n_loops):
        ids = random_ids(B, T)
        out = model.generate(ids, NEW, n_loops, temperature=0.0)
        assert torch.equal(out, greedy(model, ids, NEW, n_loops))

    def test_depth_changes_what_is_written(self, model):
        """Control for every comparison of depths here."""
        ids = random_ids(8, T)
        shallow, deep = (model.generate(ids, NEW, n, temperature=0.0) for n in (1, 6))
        assert not torch.equal(shallow, deep)

    @pytest.mark.parametrize("kv_share", ["none", "last"])
    def test_the_cache_of_the_config_is_used(self, kv_share):
        model, ids = small_model(kv_share=kv_share), random_ids(8, T)
        out = model.generate(ids, 20, 6, temperature=0.0)
        assert torch.equal(out, greedy(model, ids, 20, 6)) == (kv_share == "none")

    @pytest.mark.parametrize("n_loops", [4, [1, 7, 3]])
    @pytest.mark.parametrize("temperature", [0.0, 0.8])
    def test_without_cache_is_the_same(self, model, n_loops, temperature):
        arguments = {"n_loops": n_loops, "temperature": temperature, "seed": 3}
        ids = random_ids(B, T)
        slow = model.generate(ids, NEW, **arguments, use_cache=False)
        assert torch.equal(model.generate(ids, NEW, **arguments), slow)

    def test_top_k_one_is_greedy(self, model):
        ids = random_ids(B, T)
        out = model.generate(ids, NEW, 4, temperature=2.0, top_k=1)
        assert torch.equal(out, greedy(model, ids, NEW, 4))

    def test_every_token_follows_the_filters(self, model):
        """Each new token is among those that the filters leave of a full forward call's logits."""
        ids = random_ids(B, T)
        filters = {"top_k": 7, "top_p": 0.8, "min_p": 0.05}
        rows = SamplingParams(temperature=1.5, **filters, repetition_penalty=1.5).rows(B)
        out = model.generate(
            ids, NEW, 4, temperature=1.5, **filters, repetition_penalty=1.5, seed=1
        )
        likeliest = 0
        for end in range(T, T + NEW):
            logits = model(out[:, :end], 4)[:, -1].detach()
            logits = rows.warm(rows.penalize(logits, out[:, :end]))
            allowed = rows.filter(logits).isfinite()
            assert allowed.gather(1, out[:, end : end + 1]).all()
            likeliest += int((logits.argmax(-1) == out[:, end]).sum())
        assert 0 < likeliest < B * NEW

    @pytest.mark.parametrize("mode", ["eager", "static"])
    def test_presence_and_frequency_count_new_tokens_only(self, model, mode):
        ids, penalties = random_ids(3, T), {"presence_penalty": 0.5, "frequency_penalty": 0.4}
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        params = SamplingParams(20, temperature=0.0, **penalties, logit_bias={7: 0.5})
        decoder = decoder_factory(mode)
        out = generate(model, ids, params, Depth(3), attention_mask=mask, decoder=decoder)
        for end in range(T, T + 20):
            context = {"attention_mask": torch.ones(3, end, dtype=torch.long)}
            context["attention_mask"][:, :T] = mask
            logits = model(out[:, :end], 3, **context)[:, -1].detach()
            for row in range(3):
                new = out[row, T:end].tolist()
                for token in set(new):
                    logits[row, token] -= 0.5 + 0.4 * new.count(token)
            logits[:, 7] += 0.5
            top = logits.topk(2).values
            clear = top[:, 0] - top[:, 1] > 1e-4
            assert torch.equal(logits.argmax(-1)[clear], out[:, end][clear])
        plain = SamplingParams(20, temperature=0.0)
        assert not torch.equal(out, generate(model, ids, plain, Depth(3), attention_mask=mask))

    def test_a_bias_of_an_unknown_token_is_rejected(self, model):
        with pytest.raises(ConfigError, match="not a token id"):
            generate(model, random_ids(1, 3), SamplingParams(1, logit_bias={61: 1.0}))

    def test_repetition_penalty_counts_prompt_and_new_tokens(self, model):
        ids = random_ids(8, T)
        free = model.generate(ids, 20, 4, temperature=0.0)
        punished = model.generate(ids, 20, 4, temperature=0.0, repetition_penalty=50.0)
        repeats = [sum(len(row) - len(set(row)) for row in x.tolist()) for x in (free, punished)]
        assert repeats[1] < repeats[0] / 2


class TestRows:
    PROMPTS = (5, 2, 1)

    def ragged(self) -> tuple[Tensor, Tensor]:
        ids, mask = random_ids(B, T), torch.ones(B, T, dtype=torch.bool)
        for row, length in enumerate(self.PROMPTS):
            mask[row, : T - length] = False
        return ids, mask

    @pytest.mark.parametrize("n_loops", [4, [1, 7, 3]])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("use_cache", [True, False])
    def test_padded_prompts_equal_alone(self, model, n_loops, temperature, use_cache):
        ids, mask = self.ragged()
        arguments = {"temperature": temperature, "use_cache": use_cache, "repetition_penalty": 1.2}
        out = model.generate(ids, NEW, n_loops, **arguments, seed=[5, 6, 7], attention_mask=mask)
        for row in range(B):
            depth = n_loops if isinstance(n_loops, int) else n_loops[row]
            prompt = ids[row, mask[row]][None]
            alone = model.generate(prompt, NEW, depth, **arguments, seed=[5 + row])
            assert torch.equal(out[row, T:], alone[0, prompt.shape[1] :])

    def test_padding_must_be_declared(self, model):
        """Control: without the mask the prompts are others."""
        ids, mask = self.ragged()
        arguments = {"n_loops": 4, "temperature": 1.0, "seed": [5, 6, 7]}
        declared = model.generate(ids, NEW, **arguments, attention_mask=mask)
        assert not torch.equal(declared, model.generate(ids, NEW, **arguments))

    def test_an_exit_rule_reaches_the_loop(self, model):
        ids = random_ids(B, T)
        out = model.generate(ids, NEW, 8, temperature=0.0, exit_rule=FixedDepth(2))
        assert torch.equal(out, greedy(model, ids, NEW, 2))


class TestSeeds:
    def test_same_seed_same_text(self, model):
        ids = random_ids(B, T)
        first, again, other = (model.generate(ids, NEW, 4, seed=s) for s in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_rows_of_one_seed_differ(self, model):
        ids = random_ids(1, T).expand(B, T)
        out = model.generate(ids, NEW, 4, seed=1)
        assert len({tuple(row) for row in out.tolist()}) == B

    def test_row_zero_of_a_seed_is_that_seed_alone(self, model):
        ids = random_ids(B, T)
        out = model.generate(ids, NEW, 4, seed=9)
        assert torch.equal(model.generate(ids[:1], NEW, 4, seed=9)[0], out[0])

    def test_default_follows_the_global_generator(self, model):
        ids, runs = random_ids(B, T), []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(model.generate(ids, NEW, 4))
        assert torch.equal(runs[0], runs[1])
        assert not torch.equal(runs[0], runs[2])

    def test_greedy_with_a_seed_consumes_no_randomness(self, model):
        state = torch.get_rng_state()
        model.generate(random_ids(B, T), 2, 1, temperature=0.0, seed=1)
        assert torch.equal(torch.get_rng_state(), state)


class Letters:
    """Token i is the i-th character of a small alphabet, so that any id can be read."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(40 + i) for i in ids)


class TestEnd:
    def test_end_of_text_fills_the_row(self, model):
        ids = random_ids(B, T)
        free = model.generate(ids, NEW, 4, seed=2)
        eos = int(free[1, T + 3])
        out = model.generate(ids, NEW, 4, seed=2, eos_token_id=eos)
        for row in range(B):
            new, expected = out[row, T:].tolist(), free[row, T:].tolist()
            end = expected.index(eos) + 1 if eos in expected else NEW
            assert new[:end] == expected[:end]
            assert set(new[end:]) <= {eos}

    @pytest.mark.parametrize("mode", ["eager", "static"])
    def test_each_of_several_ends_ends_a_row(self, model, mode):
        ids = random_ids(B, T)
        free = model.generate(ids, NEW, 4, seed=2)
        ends = [int(free[0, T + 2]), int(free[1, T + 3])]
        out = model.generate(ids, NEW, 4, seed=2, eos_token_id=ends, mode=mode)
        for row in range(B):
            expected = free[row, T:].tolist()
            end = min((expected.index(x) for x in ends if x in expected), default=NEW) + 1
            assert out[row, T : T + end].tolist() == expected[:end]
            assert set(out[row, T + end :].tolist()) <= {ends[0]}

    @pytest.mark.parametrize("mode", ["eager", "static"])
    @pytest.mark.parametrize("filler", [{}, {"eos_token_id": 5}, {"pad_token_id": 7}])
    def test_what_fills_a_row_that_met_a_stop_string(self, model, mode, filler):
        """The pad token of the tokenizer, not a token that could be text."""

        class Padding(Letters):
            pad_id = 9

        ids = random_ids(B, T)
        base = SamplingParams(NEW, seed=2, **filler)
        free = generate(model, ids, base, Depth(4), decoder=decoder_factory(mode))
        texts = [Letters().decode(free[row, T:].tolist()) for row in range(B)]
        stop = next(each for each in texts[0] if each not in texts[1] and each != chr(45))
        out = generate(
            model, ids, replace(base, stop=stop), Depth(4), tokenizer=Padding(),
            decoder=decoder_factory(mode),
        )  # fmt: skip
        rest = out[0, T + texts[0].index(stop) + 1 :].tolist()
        assert rest
        assert set(rest) == {next(iter(filler.values()), 9)}

    def test_numbers_from_numpy_are_as_plain_ones(self, model):
        ids = random_ids(2, T)
        plain = model.generate(ids, 3, [2, 3], 0.5, 4, seed=[1, 2], eos_token_id=[1, 2])
        given = model.generate(
            ids, np.int64(3), np.array([2, 3]), np.float64(0.5), np.int32(4),
            seed=np.array([1, 2]), eos_token_id=np.array([1, 2]),
        )  # fmt: skip
        assert torch.equal(plain, given)
        SamplingParams(temperature=np.float32(0.8))
        config = MythosConfig(vocab_size=np.int64(97))
        config.validate()
        assert type(config.vocab_size) is int

    def test_stops_when_every_row_has_ended(self, model):
        ids = random_ids(1, T)
        free = model.generate(ids, NEW, 4, seed=2)
        eos = int(free[0, T + 3])
        first = free[0, T:].tolist().index(eos)
        out = model.generate(ids, NEW, 4, seed=2, eos_token_id=eos)
        assert torch.equal(out, free[:, : T + first + 1])

    @pytest.mark.parametrize("several", [False, True])
    def test_stop_strings(self, model, several):
        ids = random_ids(1, T)
        free = model.generate(ids, NEW, 4, seed=2)
        text = Letters().decode(free[0, T:].tolist())
        stop = text[4:6]
        end = text.index(stop) + 2
        given = ["never", stop] if several else stop
        out = model.generate(ids, NEW, 4, seed=2, stop=given, tokenizer=Letters())
        assert torch.equal(out, free[:, : T + end])

    @given(
        text=st.text("ab€\U0001f600 ", max_size=60),
        stops=st.lists(st.text("ab€ ", min_size=1, max_size=4), min_size=1, max_size=3),
        cut=st.integers(0, 3),
    )
    def test_stop_strings_are_found_as_in_the_whole_text(self, text, stops, cut):
        tokenizer = ByteTokenizer()
        ids = tokenizer.encode(text)[cut:]  # may begin inside a character
        watch = StopStrings(tokenizer, stops, 2)
        for end, token in enumerate(ids, 1):
            expected = not any(stop in tokenizer.decode(ids[:end]) for stop in stops)
            assert watch.push([token, tokenizer.eos_id]) == [expected, True]

    def test_the_work_per_token_does_not_grow(self):
        longest = 0

        class Counting(ByteTokenizer):
            def decode(self, ids):
                nonlocal longest
                longest = max(longest, len(ids))
                return super().decode(ids)

        tokenizer = Counting()
        watch = StopStrings(tokenizer, ["never"], 1)
        assert all(watch.push([token])[0] for token in tokenizer.encode("n€ve " * 500))
        assert longest < 10

    def test_stop_strings_do_not_look_at_the_prompt(self, model):
        ids = random_ids(1, T)
        stop = Letters().decode(ids[0, :3].tolist())
        out = model.generate(ids, NEW, 4, seed=2, stop=stop, tokenizer=Letters())
        assert out.shape == (1, T + NEW)

    def test_a_library_tokenizer_decodes(self):
        model = small_model(vocab_size=ByteTokenizer().vocab_size)
        ids = torch.tensor([ByteTokenizer().encode("ab")])
        assert model.generate(ids, 3, 1, stop="\x00\x00", tokenizer=ByteTokenizer()).shape[1] <= 5

    def test_no_new_tokens(self, model):
        ids = random_ids(B, T)
        assert torch.equal(model.generate(ids, 0, 4), ids)


class TestCallback:
    def test_sees_every_token_in_order(self, model):
        ids, got = random_ids(B, T), []
        out = model.generate(ids, NEW, 4, on_token=lambda i, tokens: got.append((i, tokens)))
        assert [i for i, _ in got] == list(range(NEW))
        assert torch.equal(torch.stack([tokens for _, tokens in got], 1), out[:, T:])


class TestMode:
    def test_dropout_is_off_and_the_mode_comes_back(self, attn_type):
        model = small_model(attn_type, dropout=0.5)
        ids = random_ids(B, T)
        quiet = model.generate(ids, NEW, 4, temperature=0.0)
        model.train()
        assert torch.equal(model.generate(ids, NEW, 4, temperature=0.0), quiet)
        assert model.training
        with pytest.raises(ConfigError):
            model.generate(ids, 4, n_loops=0)
        assert model.training

    def test_shapes_and_limits(self, model):
        assert model.generate(random_ids(2, 4), 60, 1).shape == (2, 64)
        with pytest.raises(ConfigError, match="max_seq_len"):
            model.generate(random_ids(2, 5), 60, 1)


def test_dense_models_generate_too(attn_type):
    model = randomise(DenseTransformer(small_config(attn_type))).eval()
    ids = random_ids(B, T)
    params = SamplingParams(NEW, temperature=0.0)
    out = model.generate(ids, params)
    assert torch.equal(out, model.generate(ids, params, use_cache=False))
