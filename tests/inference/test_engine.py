"""The engine on every kind of model, at its limits, and through every end of a request."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
import torch
from helpers import random_ids, randomise, small_config, small_model

from open_mythos import DenseTransformer
from open_mythos.errors import ConfigError
from open_mythos.inference import check
from open_mythos.inference.engine import Engine
from open_mythos.inference.facts import self_check
from open_mythos.inference.offline import Completion
from open_mythos.inference.oracle import alone, bits, play, random_request, small_engine, together
from open_mythos.inference.request import Finished, Outcome, PromptScored, Request, Token
from open_mythos.inference.sequence import Phase
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.depth import Depth
from open_mythos.model.exit_rules import AtLeast, exit_rule
from open_mythos.model.generation import generate
from open_mythos.ops.sampling import SamplingParams
from open_mythos.tokenizer import ByteTokenizer

CONTEXT = 96
KINDS = {
    "gqa, experts": {"attn_type": "gqa"},
    "mla, dense layers": {"n_experts": 0},
    "last loop shared": {"kv_share": "last"},
    "normal state": {"initial_state": "normal", "attn_type": "gqa"},
    "loop embedding": {"loop_embedding": True, "lora_rank": 0},
    "two looped layers": {"recurrent_layers": 2, "attn_type": "gqa"},
    "nothing but the loop": {"prelude_layers": 0, "coda_layers": 0},
}


@pytest.fixture(scope="module")
def mla() -> CausalLM:
    return small_model("mla", max_seq_len=CONTEXT)


def ask(id: str = "a", n_prompt: int = 5, max_tokens: int = 6, **more: object) -> Request:
    """A sampled request with early exits."""
    prompt = tuple(random_ids(1, n_prompt, seed=n_prompt)[0].tolist())
    values = {"key": 7, "max_loops": 4, "rule": "gate", "numbers": (0.7,), "logprobs": 2, **more}
    return Request(id, prompt, max_tokens, **values)


def assert_as_generate(model: CausalLM, *requests: Request, **options: object) -> None:
    """Tokens, loops and ends of ``generate``."""
    assert_equal([alone(model, each) for each in requests], model, *requests, **options)


def assert_equal(
    plains: Sequence[Completion], model: CausalLM, *requests: Request, **options: object
) -> None:
    """The engine's completions are these."""
    done = together(small_engine(model, **options), requests)
    for plain, each in zip(plains, requests, strict=True):
        mine = done[each.id]
        assert (mine.tokens, mine.loops, mine.outcome) == (plain.tokens, plain.loops, plain.outcome)
        if each.logprobs is not None:
            assert mine.logprobs == pytest.approx(plain.logprobs, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_models(kind):
    model = small_model(**{"attn_type": "mla", **KINDS[kind]}, max_seq_len=CONTEXT)
    assert not any(check.parity(model, 8, 3))
    assert not any(check.schedules(model, 1, 3))


def test_a_dense_model():
    model = randomise(DenseTransformer(small_config("gqa", max_seq_len=136), 3)).eval()
    assert not any(check.parity(model, 16, 3))
    assert not any(check.schedules(model, 2, 3))
    assert not any(check.prefix(model, 3))


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_exact_in_bfloat16(attn_type):
    model = small_model(attn_type, max_seq_len=CONTEXT).to(torch.bfloat16)
    assert not any(check.schedules(model, 2, 3))


def test_limits(mla):
    """One token; several chunks and pages; the context exactly full; deeper than trained."""
    requests = [
        ask("one", max_tokens=1), ask("short", n_prompt=1), ask("long", n_prompt=70, max_tokens=3),
        ask("full", n_prompt=CONTEXT - 3, max_tokens=3), ask("deep", max_loops=7, rule="none"),
        ask("only one loop", max_loops=1), ask("even", n_prompt=16), ask("pages", n_prompt=8),
    ]  # fmt: skip
    requests = [replace(e, numbers=() if e.rule == "none" else e.numbers) for e in requests]
    plains = [alone(mla, each) for each in requests]
    assert_equal(plains, mla, *requests, max_loops=7)
    assert_equal(plains, mla, *requests, max_loops=7, exact=False, slots=2)


def test_scored_prompts(mla):
    request = ask(n_prompt=40, max_tokens=2, rule="none", numbers=(), prompt_logprobs=True)
    engine = small_engine(mla)
    for id in ("first", "cached pages are not used"):
        engine.add(replace(request, id=id))
        events = []
        while engine.busy:
            events += engine.step()
        (scored,) = [each for each in events if isinstance(each, PromptScored)]
        with torch.no_grad():
            logits_TV = mla(torch.tensor([request.prompt]), n_loops=4)[0].float()
        expected = logits_TV.log_softmax(-1)[range(39), request.prompt[1:]].tolist()
        assert scored.logprobs[0] is None
        assert scored.logprobs[1:] == pytest.approx(expected, abs=1e-4)
        best = [top[0][0] for top in scored.top[1:]]
        assert best == logits_TV[:-1].argmax(-1).tolist()


def test_a_request_without_tokens_scores_its_prompt(mla):
    engine = small_engine(mla)
    engine.add(ask(max_tokens=0, prompt_logprobs=True))
    events = []
    while engine.busy:
        events += engine.step()
    assert [type(each) for each in events[-2:]] == [PromptScored, Finished]
    assert events[-1].outcome is Outcome.LENGTH
    assert not any(isinstance(each, Token) for each in events)


def test_scores_that_are_not_numbers_fail_their_request():
    model = small_model("mla", max_seq_len=CONTEXT)
    with torch.no_grad():
        model.head.weight[3] = torch.nan
    engine = small_engine(model)
    for tokens in (0, 2):
        engine.add(ask(str(tokens), max_tokens=tokens, prompt_logprobs=True))
    events = []
    while engine.busy:
        events += engine.step()
    ends = [each for each in events if isinstance(each, Finished)]
    assert [(e.outcome, e.error) for e in ends] == [(Outcome.FAILED, "nonfinite_logits")] * 2
    assert not any(isinstance(each, PromptScored | Token) for each in events)


@pytest.mark.parametrize("at", ["prompt", "decode"])
def test_not_a_number_ends_its_request_alone(at):
    """A poisoned embedding; the others' bits are those without it."""
    model = small_model("mla", max_seq_len=CONTEXT)
    poison = 60
    others = [ask(f"{i}", i + 3, logit_bias=((poison, -1e9),)) for i in range(5)]
    others = [replace(e, prompt=tuple(min(t, poison - 1) for t in e.prompt)) for e in others]
    bad = ask("bad", max_tokens=9, rule="none", numbers=())
    if at == "prompt":
        bad = replace(bad, prompt=(1, poison, 2))
    else:  # its first choice is the poisoned token
        bad = replace(bad, prompt=(1, 2), logit_bias=((poison, 1e9),))
    expected = together(small_engine(model), others)
    with torch.no_grad():
        model.embedding.weight[poison] = torch.nan
    engine = small_engine(model)
    done = together(engine, [bad, *others])
    assert (done["bad"].outcome, done["bad"].error) == (Outcome.FAILED, "nonfinite_logits")
    assert len(done["bad"].tokens) == (at == "decode")
    for each in others:
        assert bits(done[each.id]) == bits(expected[each.id])
    # who gets its slot and pages afterwards is not affected
    again = together(engine, others)
    assert [bits(again[e.id]) for e in others] == [bits(expected[e.id]) for e in others]
    assert engine.stats()["failed"] == 1


def test_cancelled_in_every_phase(mla):
    requests = [ask(f"{i}", n_prompt=20 + i, max_tokens=4, key=i) for i in range(4)]
    plain = {each.id: alone(mla, each).tokens for each in requests}
    phases, tick, ended = Counter[Phase](), 0, False
    while not ended:
        engine = small_engine(mla, slots=2, edge_fraction=1.0)
        for each in requests:
            engine.add(each)
        for _ in range(tick):
            engine.step()
        victim = requests[tick % 4].id
        live = engine.scheduler.places.running()
        found = [each.phase for each in live if each.request.id == victim]
        queued = engine.scheduler.counts()["queued"] > 0
        phases.update(found or ([Phase.QUEUED] if queued else []))
        ended = not engine.busy
        engine.cancel(victim)
        events = engine.step()
        if found:
            assert Finished(victim, Outcome.CANCELLED) in events
        tokens: dict[str, list[int]] = {each.id: [] for each in requests}
        while engine.busy:
            for each in engine.step():
                if isinstance(each, Token):
                    tokens[each.id].append(each.token)
        engine.scheduler.check()
        stats = engine.stats()
        assert stats["pages_held"] == stats["slots_used"] == 0
        assert stats["admitted"] == stats["finished"] + stats["cancelled"] == 4
        for id, own in tokens.items():
            assert own == plain[id][len(plain[id]) - len(own) :] or id == victim
        tick += 3
    assert {Phase.QUEUED, Phase.PREFILL, Phase.LOOPING, Phase.WAITING} <= set(phases)


def test_deadlines_and_refusals(mla):
    now = 0.0
    engine = small_engine(mla, clock=lambda: now)
    engine.add(ask("late", max_tokens=20, deadline=5.0))
    engine.add(ask("early", max_tokens=3, deadline=50.0))
    outcomes = {}
    while engine.busy:
        now += 1.0
        outcomes |= {e.id: e.outcome for e in engine.step() if isinstance(e, Finished)}
        now += 1.0 if "late" not in outcomes else 0.0
    assert outcomes == {"late": Outcome.TIMEOUT, "early": Outcome.LENGTH}
    for wrong in (
        ask(n_prompt=CONTEXT), ask(max_loops=5), ask(max_loops=0),
        replace(ask(), prompt=(61,)), ask(max_tokens=0), ask(logit_bias=((61, 1.0),)),
        ask(logit_bias=((0, float("nan")),)), ask(numbers=()), ask(numbers=(float("nan"),)),
        ask(numbers=(1.5,)), ask(rule="acceleration", numbers=(0.5,)), ask(key=1 << 63),
        ask(rule="acceleration", numbers=(0.5, 1.5)), ask(top_k=1 << 63), ask(ends=(1 << 63,)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"where:"):
            engine.add(wrong)
    assert not engine.busy


def test_statistics_add_up(mla):
    requests = [ask(f"{i}", n_prompt=5 + i, key=i) for i in range(6)]
    engine = small_engine(mla)
    done = together(engine, requests)
    stats = engine.stats()
    loops = [n for each in done.values() for n in each.loops]
    assert stats["generated_tokens"] == len(loops) == 36
    assert stats["decode_loops"] == sum(loops)
    assert stats["loops_per_token"] == {str(k): n for k, n in sorted(Counter(loops).items())}
    assert stats["prompt_tokens"] == sum(len(each.prompt) for each in requests)
    assert stats["prompt_tokens"] == stats["prefix_miss_tokens"]
    # a token's first loops belong to the prompt
    assert stats["loop_rows"] == sum(loops) - sum(each.loops[0] for each in done.values())
    assert stats["pages_free"] + stats["pages_cached"] == stats["pages"]


def test_two_engines_on_one_model(mla):
    """In two threads."""
    draw = Random(2)
    requests = [random_request(draw, f"{i}", mla) for i in range(6)]
    expected = together(small_engine(mla), requests)
    results: list[dict] = []
    threads = [
        threading.Thread(target=lambda: results.append(together(small_engine(mla), requests)))
        for _ in range(2)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(results) == 2
    for done in results:
        assert [bits(done[id]) for id in done] == [bits(expected[id]) for id in done]


def test_offline_draws_as_a_batch(mla):
    """Row i of ``generate`` on all prompts, with one seed and with several."""
    prompts = random_ids(4, 6, seed=3)
    rule = AtLeast(exit_rule("gate:0.7", mla), 2)
    for seed in (11, (5, 6, 7, 8)):
        params = SamplingParams(7, seed=seed, top_k=30, eos_token_id=9, repetition_penalty=1.2)
        depth = Depth([1, 2, 3, 4], rule)
        out = generate(mla, prompts, params, depth)[:, 6:].tolist()
        done = small_engine(mla, slots=3).generate(prompts.tolist(), params, depth)
        for row, each in zip(out, done, strict=True):
            assert each.tokens == row[: len(each.tokens)]
            assert len(each.tokens) == 7 or each.tokens[-1] == 9
            assert each.outcome is (Outcome.STOP if 9 in each.tokens else Outcome.LENGTH)


def test_stop_strings_as_generate():
    tokenizer = ByteTokenizer()
    model = small_model("gqa", vocab_size=tokenizer.vocab_size, n_experts=0, max_seq_len=CONTEXT)
    free = SamplingParams(24, seed=4, top_k=3, logit_bias=dict.fromkeys(range(97, 123), 9.0))
    text = small_engine(model).generate(["to be"], free, tokenizer=tokenizer)[0].text
    assert text is not None
    assert len(text) > 10
    for stop in (text[3:5], text[8], "not there"):
        params = replace(free, stop=(stop,))
        ids = torch.tensor([tokenizer.encode("to be")])
        plain = generate(model, ids, params, tokenizer=tokenizer)[0, 5:].tolist()
        (done,) = small_engine(model).generate(["to be"], params, tokenizer=tokenizer)
        assert done.tokens == plain
        assert done.text == text.partition(stop)[0]
        stopped = stop in text
        assert done.outcome is (Outcome.STOP_STRING if stopped else Outcome.LENGTH)


def test_an_id_may_be_used_again(mla):
    engine = Engine(mla, slots=2)
    first = play(engine, {0: [ask()]}, cancels={3: ["a", "unknown"]})
    assert first["a"].outcome is Outcome.CANCELLED
    assert play(engine, {0: [ask()]})["a"].tokens == alone(mla, ask()).tokens


@pytest.mark.parametrize("fused", [False, True])
def test_prefixes_of_other_weights_are_forgotten(fused):
    model, ids = small_model("gqa", n_experts=0, max_seq_len=CONTEXT), random_ids(1, 40, seed=3)
    engine, params = small_engine(model), SamplingParams(8, temperature=0.0)
    engine.generate(ids.tolist(), params)
    assert engine.generate(ids.tolist(), params)[0].cached_tokens == 32
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    model(ids).square().mean().backward()
    optimizer.step()
    (done,) = engine.generate(ids.tolist(), params)
    assert done.cached_tokens == 0
    assert done.tokens == generate(model, ids, params)[0, 40:].tolist()


def test_a_call_that_fails_leaves_no_requests(mla):
    engine, params = small_engine(mla, slots=2), SamplingParams(8, seed=1)
    with pytest.raises(ConfigError, match="vocabulary"):
        engine.generate([[1, 2, 3]] * 5 + [[10**6]], params)
    assert not engine.busy
    engine.scheduler.check()
    fresh = small_engine(mla, slots=2).generate([[1, 2, 3]], params)
    assert engine.generate([[1, 2, 3]], params)[0].tokens == fresh[0].tokens
    engine.add(ask())
    with pytest.raises(ConfigError, match="runs other requests"):
        engine.generate([[1, 2, 3]], params)


@pytest.mark.parametrize("size", ["slots", "context", "max_loops", "page", "kv_memory"])
def test_zero_is_no_size(mla, size):
    with pytest.raises(ConfigError, match=f"{size} is out of range"):
        Engine(mla, **{size: 0})


def test_context_above_the_model_s_is_refused(mla):
    assert Engine(mla, context=CONTEXT).context == CONTEXT
    with pytest.raises(ConfigError, match="the model's context is shorter"):
        Engine(mla, context=CONTEXT + 1)


def test_books_are_checked_while_requests_run(mla, monkeypatch):
    monkeypatch.setattr("open_mythos.inference.engine._TICKS_PER_CHECK", 3)
    engine, checked = small_engine(mla, slots=2), []
    monkeypatch.setattr(engine.scheduler, "check", lambda: checked.append(engine.busy))
    together(engine, [ask(max_tokens=8)])
    assert checked.count(True) >= 2
    assert checked[-1] is False


def test_equally_likely_alternatives():
    """Which of them are returned does not depend on how many others ask for."""
    model = small_model("gqa", n_experts=0, max_seq_len=CONTEXT, vocab_size=512)
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight[:4].repeat(128, 1))
    few, many = ask("few", max_tokens=20, logprobs=2), ask("many", max_tokens=20, logprobs=20)
    (own,) = together(small_engine(model), [few]).values()
    assert bits(together(small_engine(model), [few, many])["few"]) == bits(own)


def test_self_check(mla, monkeypatch):
    engine = small_engine(mla, slots=4)
    self_check(engine)
    assert not engine.busy
