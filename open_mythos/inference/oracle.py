"""What the engine's answers are compared with: plain ``generate``, and the same request alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.errors import InternalError
from open_mythos.hub.pretrained import save_pretrained
from open_mythos.inference.engine import Engine
from open_mythos.inference.levels import Groups, LevelRows, layout_of
from open_mythos.inference.offline import Completion
from open_mythos.inference.places import written
from open_mythos.inference.request import Outcome, Request
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.depth import Depth
from open_mythos.model.exit_rules import AtLeast, exit_rule
from open_mythos.model.generation import GrowingDecoder, generate
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.trace import LoopTrace
from open_mythos.ops.sampling import SamplingParams, log_probabilities
from open_mythos.run_folder import TOKENIZER_FOLDER
from open_mythos.tokenizer import ByteTokenizer

RULES = (
    ("none", ()), ("gate", (0.3,)), ("gate", (0.7,)), ("gate", (0.95,)), ("change", (0.3,)),
    ("change", (0.8,)), ("acceleration", (0.6, 1.0)), ("acceleration", (0.9, 2.0)),
)  # fmt: skip
"""Exit rules of random requests."""
PAGE, CHUNK_LOOP_TOKENS = 8, 64
"""Of the engines of checks: small, so that short prompts have several pages and chunks."""
MOST_SLOTS = 16
MOST_TICKS = 5000
"""Ticks of :func:`play` at most; the requests of checks end far earlier."""


def write_checkpoint(folder: str, attn: str, experts: int, seed: int) -> None:
    """Write a small model with random weights, and the byte tokenizer."""
    cfg = MythosConfig(
        vocab_size=ByteTokenizer.vocab_size, dim=32, n_heads=4, n_kv_heads=2, max_seq_len=256,
        max_loop_iters=6, prelude_layers=1, coda_layers=1, attn_type=attn, kv_lora_rank=20,
        q_lora_rank=12, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=10, n_experts=experts,
        n_shared_experts=1, n_experts_per_tok=2, expert_dim=16, lora_rank=3, max_output_tokens=128,
    )  # fmt: skip
    save_pretrained(scattered(OpenMythos(cfg), seed), folder)
    ByteTokenizer().save(Path(folder) / TOKENIZER_FOLDER)


@torch.no_grad()
def scattered(model: OpenMythos, seed: int) -> OpenMythos:
    """Give every parameter a random value, so large that tokens and exits vary."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if "norm" in name:
            value.copy_(1 + 0.2 * noise)
        elif name.endswith(("log_A", "dt_bias")):
            value.add_(0.5 * noise)
        elif name.endswith(("embedding.weight", "gate.bias")):
            value.copy_(noise)
        else:
            fan_in = value.shape[-2 if value.dim() == 3 else -1]
            value.copy_(0.9 * noise / fan_in**0.5)
    return model.eval()


def random_request(draw: Random, id: str, model: CausalLM, most_tokens: int = 8) -> Request:
    """Return a request of any kind that ``generate`` can serve, too."""
    cfg, looped = model.cfg, isinstance(model, OpenMythos)
    sampled = draw.random() < 0.6
    rule, numbers = draw.choice(RULES) if looped else RULES[0]
    loops = draw.randint(1, cfg.max_loop_iters) if looped else 0
    length = draw.choice([1, draw.randint(2, 8), draw.randint(9, 40)])
    request = Request(
        id, tuple(draw.randrange(cfg.vocab_size) for _ in range(length)),
        draw.randint(1, most_tokens), temperature=draw.choice([0.7, 1.0, 1.5]) if sampled else 0.0,
        key=draw.getrandbits(62), max_loops=loops, rule=rule, numbers=numbers,
        min_loops=draw.randint(1, max(loops, 1)) if draw.random() < 0.3 else 1,
        ends=tuple(draw.randrange(cfg.vocab_size) for _ in range(draw.choice([0, 1, 4]))),
        logprobs=draw.choice([0, 3]),
    )  # fmt: skip
    options: list[dict[str, Any]] = [
        {}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.1}, {"repetition_penalty": 1.3},
        {"presence_penalty": 0.5, "frequency_penalty": 0.4},
        {"logit_bias": ((draw.randrange(cfg.vocab_size), 4.0),)},
    ]  # fmt: skip
    return replace(request, **(draw.choice(options) | draw.choice(options[4:])))


@dataclass(frozen=True)
class _WithKey(SamplingParams):
    """Sampling parameters of a request, which has a key and no seed."""

    key: int = 0

    def row_keys(self, batch: int) -> Tensor:
        return torch.full((batch,), self.key)


def alone(model: CausalLM, request: Request) -> Completion:
    """Return what ``generate`` makes of a request's prompt."""
    trace, done = LoopTrace(), Completion(request.prompt, outcome=Outcome.LENGTH)
    logits: list[Tensor] = []
    hook = model.head.register_forward_hook(lambda *call: logits.append(call[2].float()))

    def take(i: int, token_1: Tensor) -> None:
        if done.outcome is Outcome.STOP:
            return
        exits = trace.exits if request.rule != "none" else None
        done.tokens.append(int(token_1))
        done.loops.append(request.max_loops if exits is None else int(exits[0, -1]))
        own, ids, top = log_probabilities(logits[-1], token_1, request.logprobs or 0)
        done.logprobs.append(None if request.logprobs is None else float(own))
        done.top.append(tuple(zip(ids[0].tolist(), top[0].tolist(), strict=True)))
        if done.tokens[-1] in request.ends:
            done.outcome = Outcome.STOP

    try:
        generate(
            model, torch.tensor([request.prompt]), _params(request), _depth(model, request),
            on_token=take, decoder=partial(GrowingDecoder, trace=trace),
        )  # fmt: skip
    finally:
        hook.remove()
    return done


def _params(request: Request) -> SamplingParams:
    return _WithKey(
        request.max_tokens, request.temperature, request.top_k, request.top_p, request.min_p,
        request.repetition_penalty, presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty, logit_bias=request.logit_bias,
        key=request.key,
    )  # fmt: skip


def _depth(model: CausalLM, request: Request) -> Depth:
    if request.rule == "none":
        return Depth(request.max_loops or None)
    first, *hits = request.numbers
    text = ",".join([f"{request.rule}:{first}", *(str(int(n)) for n in hits)])
    rule = exit_rule(text, model)
    return Depth(request.max_loops, AtLeast(rule, max(request.min_loops, 1)))


def small_engine(model: CausalLM, requests: Iterable[Request] = (), **options: Any) -> Engine:
    """Return an engine with small pages and chunks.

    Args:
        model: The model.
        requests: If given, the cache has room for the largest of them, and little more.
        options: Of the engine.
    """
    defaults: dict[str, Any] = {
        "slots": MOST_SLOTS, "page": PAGE, "chunk_loop_tokens": CHUNK_LOOP_TOKENS,
    }  # fmt: skip
    options = defaults | options
    layout = layout_of(model, options["page"])
    needed = [layout.pages(each.max_loops, written(each)) for each in requests]
    if needed:
        page_bytes = layout.page * model.cfg.cache_width * model.final_norm.weight.element_size()
        options["kv_memory"] = float(page_bytes * (max(needed) * 3 // 2))
    return Engine(model, **options)


Marks = Mapping[int, Sequence[str]]
"""Tick -> ids of requests."""


def play(
    engine: Engine, joins: Mapping[int, Sequence[Request]], cancels: Marks | None = None,
    preempts: Marks | None = None,
) -> dict[str, Completion]:  # fmt: skip
    """Run requests that join, are cancelled or taken out at given ticks; check the books.

    Returns:
        Id -> what was generated; cancelled requests up to there.

    Raises:
        InternalError: The books are wrong, or the requests do not end.
    """
    done: dict[str, Completion] = {}
    tick, last = 0, max(joins, default=-1)
    while tick <= last or engine.busy:
        for request in joins.get(tick, ()):
            done[request.id] = Completion(request.prompt)
            engine.add(request)
        for id in (cancels or {}).get(tick, ()):
            engine.cancel(id)
        for id in (preempts or {}).get(tick, ()):
            engine.scheduler.preempt(id)
        for event in engine.step():
            done[event.id].take(event)
        tick += 1
        if tick > MOST_TICKS:
            raise InternalError(
                "requests do not end",
                where="Engine",
                value=engine.stats(),
                allowed="requests that end",
            )
    engine.scheduler.check()
    return done


def together(engine: Engine, requests: Sequence[Request]) -> dict[str, Completion]:
    """Run requests that join at once."""
    return play(engine, {0: requests})


def by_tick(marks: Iterable[tuple[int, Any]]) -> dict[int, list[Any]]:
    """Collect pairs of a tick and what happens then."""
    ticks: dict[int, list[Any]] = defaultdict(list)
    for tick, mark in marks:
        ticks[tick].append(mark)
    return ticks


def bits(done: Completion) -> tuple[Any, ...]:
    """Return everything of a completion that must not depend on other requests, by token."""
    return tuple(zip(done.tokens, done.loops, done.logprobs, done.top, strict=True))


def _no_tiles(engine: Engine) -> None:
    engine.runner._whole_tiles = False


def _no_expert_tiles(engine: Engine) -> None:
    engine.runner.exact = False  # batches of all slots are whole tiles still


def _one_width(engine: Engine) -> None:
    at = engine.runner.cache.at

    def widest(
        slots_R: Tensor, positions_R: Tensor, real_R: Tensor | None, groups: Groups, *more: Any
    ) -> LevelRows:
        most = max(pages for _, _, pages in groups)
        return at(slots_R, positions_R, real_R, ((0, len(slots_R), most),), *more)

    setattr(engine.runner.cache, "at", widest)  # noqa: B010


BREAKS: dict[str, Callable[[Engine], None]] = {
    "tiles": _no_tiles, "experts": _no_expert_tiles, "width": _one_width,
}  # fmt: skip
"""Switch one rule of exact mode off, which a check must notice."""
