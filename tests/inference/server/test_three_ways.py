"""Plain ``generate``, the engine and the HTTP server continue a prompt alike."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import httpx
import pytest
import torch
from helpers import small_model

from open_mythos import save_pretrained
from open_mythos.inference.engine import Engine
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.depth import Depth
from open_mythos.model.exit_rules import exit_rule
from open_mythos.model.generation import generate
from open_mythos.ops.sampling import SamplingParams
from open_mythos.tokenizer import ByteTokenizer
from tests.inference.server.running import wait_for

pytestmark = pytest.mark.slow
TOKENIZER = ByteTokenizer()
ACCENTS = {97: 9.0, 0xC3: 9.0, 0xA9: 9.0, 0xE2: 8.0, 0x82: 8.0, 0xAC: 8.0}
"""Makes text of "a", "é", "€" and broken pieces of them."""


@dataclass
class Case:
    """What is asked for in all three ways."""

    prompt: list[int]
    params: SamplingParams
    n_loops: int | None = None
    rule: str = "none"
    n: int = 1

    @property
    def body(self) -> dict[str, Any]:
        """Return the request of the HTTP API."""
        p = self.params
        depth = {"exit_rule": self.rule} if self.n_loops is None else {"n_loops": self.n_loops}
        return {
            "prompt": self.prompt, "max_tokens": p.max_new_tokens, "temperature": p.temperature,
            "top_k": p.top_k or 0, "top_p": p.top_p, "min_p": p.min_p, "seed": p.seed or 0,
            "repetition_penalty": p.repetition_penalty, "presence_penalty": p.presence_penalty,
            "frequency_penalty": p.frequency_penalty, "stop": list(p.stop) or None, "n": self.n,
            "logit_bias": {str(token): value for token, value in p.biases},
            "return_token_ids": True, "return_loops": True, **depth,
        }  # fmt: skip


def cases() -> list[Case]:
    draw, end = Random(4), TOKENIZER.eos_id
    greedy = SamplingParams(12, temperature=0.0, top_k=0, eos_token_id=end)
    sampled = SamplingParams(12, top_k=0, seed=11, eos_token_id=end)
    accents = replace(sampled, max_new_tokens=24, logit_bias=ACCENTS)
    given = [
        (greedy, {}), (greedy, {"n_loops": 2}), (greedy, {"rule": "gate:0.6"}),
        (sampled, {}), (sampled, {"n": 3}), (sampled, {"rule": "acceleration:0.9,1"}),
        (replace(sampled, top_p=0.8, min_p=0.05), {}), (replace(sampled, top_k=7), {"n_loops": 1}),
        (replace(sampled, repetition_penalty=1.3, presence_penalty=0.5), {}),
        (replace(greedy, frequency_penalty=0.7), {"rule": "change:0.5"}),
        (replace(greedy, logit_bias={end: 100.0}), {}),
        (accents, {}), (replace(accents, stop=("é",)), {}),
        (replace(accents, stop=("€a", "aé")), {}),
        (replace(accents, stop=("\ufffd",)), {}), (replace(accents, stop=("never",)), {"n": 2}),
    ]  # fmt: skip
    lengths = (1, 3, 16, 64, 65, 90)
    return [
        Case([draw.randrange(256) for _ in range(length)], params, **more)
        for i, (params, more) in enumerate(given)
        for length in (lengths[i % 6], lengths[(i + 3) % 6])
    ]


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return small_model("mla", vocab_size=TOKENIZER.vocab_size, max_seq_len=128)


@pytest.fixture(scope="module")
def url(model: CausalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    save_pretrained(model, folder / "m")
    TOKENIZER.save(folder / "m" / "tokenizer")
    words = ["serve", str(folder / "m"), "--port", "0", "--port-file", str(folder / "port")]
    command = [sys.executable, "-m", "open_mythos", *words, "--engine", '{"slots": 5}']
    process = subprocess.Popen(command, stderr=subprocess.PIPE)

    def port() -> str:
        assert process.poll() is None
        return (folder / "port").read_text() if (folder / "port").exists() else ""

    try:
        wait_for(port, 60)
        url = f"http://127.0.0.1:{port().strip()}"
        wait_for(lambda: port() and httpx.get(f"{url}/health/ready").status_code == 200, 60)
        yield url
    finally:
        process.kill()
        process.communicate()


def plainly(model: CausalLM, case: Case) -> list[list[int]]:
    """Return the tokens of ``generate``, without those that fill ended rows."""
    rule = None if case.rule == "none" else exit_rule(case.rule, model)
    ids = torch.tensor([case.prompt] * case.n)
    rows = generate(model, ids, case.params, Depth(case.n_loops, rule), tokenizer=TOKENIZER)
    rows, end = rows[:, len(case.prompt) :].tolist(), TOKENIZER.eos_id
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def test_three_ways(model: CausalLM, url: str) -> None:
    engine, asked = Engine(model, slots=5), cases()
    with ThreadPoolExecutor(8) as pool:  # in company, unlike the other ways
        answers = list(pool.map(lambda each: post(url, each.body), asked))
    for case, answer in zip(asked, answers, strict=True):
        rule = None if case.rule == "none" else exit_rule(case.rule, model)
        done = engine.generate(
            [case.prompt] * case.n, case.params, Depth(case.n_loops, rule), tokenizer=TOKENIZER
        )
        plain = plainly(model, case)
        for tokens, mine, choice in zip(plain, done, answer["choices"], strict=True):
            assert without_end(mine.tokens) == without_end(tokens), case
            assert choice["token_ids"] == mine.tokens, case
            assert choice["loops"] == mine.loops, case
            assert choice["text"] == mine.text, case
            ends = {"length": "length", "stop": "stop", "stop_string": "stop"}
            assert mine.outcome is not None
            assert choice["finish_reason"] == ends[mine.outcome.value], case
    outcomes = {choice["stop_reason"] for answer in answers for choice in answer["choices"]}
    assert outcomes >= {None, "é", TOKENIZER.eos_id}, "cases that end in every way"


def without_end(tokens: list[int]) -> list[int]:
    """``generate`` fills rows that a stop string ended with the end token."""
    return [token for token in tokens if token != TOKENIZER.eos_id]


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found
