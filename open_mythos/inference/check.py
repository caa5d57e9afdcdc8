"""Checks of the engine on a stored model: ``python -m open_mythos.inference.check COMMAND MODEL``.

Every finding is a line, the last line counts, and the exit code is 1 if there is any finding.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from random import Random
from typing import TYPE_CHECKING, Any

from open_mythos.errors import MythosError

if TYPE_CHECKING:
    from open_mythos.inference.offline import Completion
    from open_mythos.inference.request import Request
    from open_mythos.model.causal_lm import CausalLM

BREAKS = ("tiles", "experts", "width")
MOST_APART = 1e-3
"""Log-probabilities of engine and ``generate``, in nats: their sums have another order."""
Findings = Iterator[str | None]
"""A finding, or None for a comparison that held."""


def parity(model: CausalLM, requests: int, seed: int) -> Findings:
    """Compare mixed requests through the engine with ``generate`` of each prompt alone."""
    from open_mythos.inference.oracle import alone, random_request, small_engine, together

    draw = Random(seed)
    asked = [random_request(draw, f"{i}", model) for i in range(requests)]
    while asked:
        size, slots, exact = (
            draw.randint(4, 40),
            draw.choice([1, 3, 8, 16, 20]),
            draw.random() < 0.5,
        )
        some, asked = asked[:size], asked[size:]
        engine = small_engine(model, slots=slots, exact=exact, edge_fraction=draw.random())
        done = together(engine, some)
        for each in some:
            wrong = _unlike(alone(model, each), done[each.id])
            yield f"{wrong}: {slots=} {exact=} {each}" if wrong else None


def _unlike(plain: Completion, mine: Completion) -> str | None:
    """Describe how a request was answered otherwise than by ``generate``."""
    for what in ("tokens", "loops", "outcome"):
        expected, got = getattr(plain, what), getattr(mine, what)
        if expected != got:
            return f"{what} {got} are not {expected}"
    pairs = zip(plain.logprobs, mine.logprobs, strict=True)
    apart = max((abs(a - b) for a, b in pairs if a is not None and b is not None), default=0.0)
    # tokens can agree by luck where the cache does not
    return f"log-probabilities differ by {apart}" if apart > MOST_APART else None


def schedules(model: CausalLM, cases: int, seed: int, broken: str | None = None) -> Findings:
    """Compare requests in random company with the same request alone, bit for bit."""
    from open_mythos.inference import oracle

    draw = Random(seed)
    pool = [oracle.random_request(draw, f"{i}", model, 12) for i in range(min(cases, 40) + 8)]
    # some prompts begin alike
    pool[::5] = [replace(e, prompt=(pool[0].prompt * 40)[: 20 + len(e.prompt)]) for e in pool[::5]]
    own = _alone_in_engine(model, pool)
    for case in range(cases):
        some = draw.sample(pool, draw.randint(2, min(24, len(pool))))
        engine = oracle.small_engine(
            model, some if draw.random() < 0.5 else (), slots=draw.choice([1, 2, 5, 12, 16, 20]),
            overcommit=draw.random() < 0.5, edge_fraction=draw.random(), exact=True,
            ticks_per_chunk=draw.randint(1, 5),
        )  # fmt: skip
        if broken is not None:
            oracle.BREAKS[broken](engine)
        joins = [(draw.choice([0, draw.randint(0, 40)]), each) for each in some]
        cancelled = {each.id for each in some if draw.random() < 0.2}
        done = oracle.play(
            engine, oracle.by_tick(joins),
            oracle.by_tick((draw.randint(0, 80), id) for id in sorted(cancelled)),
            oracle.by_tick((draw.randint(0, 80), each.id) for each in some),
        )  # fmt: skip
        for each in some:
            yield _difference(own[each.id], done[each.id], f"case {case}", each)


def prefix(model: CausalLM, seed: int) -> Findings:
    """Compare prompts that find a cached prefix with the same prompts on an empty cache."""
    from open_mythos.inference import oracle
    from open_mythos.model.mythos import OpenMythos

    draw, cfg = Random(seed), model.cfg
    loops = cfg.max_loop_iters if isinstance(model, OpenMythos) else 0
    for page, (rule, numbers) in product((8, 32), oracle.RULES[:2] if loops else oracle.RULES[:1]):
        engine = oracle.small_engine(model, page=page, exact=True)
        base = oracle.random_request(draw, "", model)
        base = replace(
            base,
            max_tokens=3,
            max_loops=loops,
            min_loops=1,
            rule=rule,
            numbers=numbers,
            ends=(),
            logprobs=2,
        )
        chunk = _chunk(loops)
        unit = max(chunk, page)
        near = {n * k + d for n in (chunk, page, unit) for k in (1, 2) for d in (-1, 0, 1)}
        ids = [draw.randrange(cfg.vocab_size) for _ in range(max(near) + 1)]
        for length in sorted(each for each in near if each > 0):
            # a salt of its own: shorter prompts left nothing
            asked = replace(base, prompt=tuple(ids[:length]), salt=f"{length}")
            (cold, warm) = (
                oracle.together(engine, [replace(asked, id=id)])[id] for id in ("cold", "warm")
            )
            want = (length - 1) // unit * unit
            if (cold.cached_tokens, warm.cached_tokens) != (0, want):
                yield f"{cold.cached_tokens}, then {warm.cached_tokens} cached, not {want}: {asked}"
            yield _difference(cold, warm, f"{page=} {length=}", asked)
        for other in _other_facts(asked):
            found = oracle.together(engine, [other])[other.id].cached_tokens
            yield f"{found} tokens of {asked} cached for {other}" if found else None


def preempt(model: CausalLM, seed: int, ticks: Iterable[int] = range(1, 51)) -> Findings:
    """Take all requests out at one of ``ticks``, and compare with the same requests alone."""
    from open_mythos.inference import oracle

    draw = Random(seed)
    some = [oracle.random_request(draw, f"{i}", model, 12) for i in range(5)]
    some = [replace(each, max_tokens=12, ends=()) for each in some]
    # one that runs until the last of the ticks
    some[0] = replace(some[0], rule="none", numbers=(), max_tokens=60)
    own = _alone_in_engine(model, some)
    for tick in ticks:
        engine = oracle.small_engine(model, slots=4, overcommit=True, exact=True)
        done = oracle.play(engine, {0: some}, preempts={tick: [each.id for each in some]})
        if not engine.stats()["preemptions"]:
            yield f"{tick=}: nobody was taken out"
        for each in some:
            yield _difference(own[each.id], done[each.id], f"{tick=}", each)


def _alone_in_engine(model: CausalLM, requests: Sequence[Request]) -> dict[str, Completion]:
    from open_mythos.inference.oracle import small_engine, together

    return {
        each.id: together(small_engine(model, exact=True), [each])[each.id] for each in requests
    }


def _difference(own: Completion, got: Completion, where: str, request: Request) -> str | None:
    """Describe how a request ended otherwise than alone; a cancelled one may be shorter."""
    from open_mythos.inference.oracle import bits
    from open_mythos.inference.request import Outcome

    mine, alone = bits(got), bits(own)
    if got.outcome is Outcome.CANCELLED:
        alone = alone[: len(mine)]
    elif got.outcome is not own.outcome:
        return f"{where}: outcome {got.outcome}, alone {own.outcome}: {got.error} {request}"
    if mine == alone:
        return None
    at = next((i for i, (a, b) in enumerate(zip(mine, alone, strict=False)) if a != b), len(mine))
    return f"{where}: token {at} is {mine[at : at + 1]}, alone {alone[at : at + 1]}: {request}"


def _other_facts(request: Request) -> list[Request]:
    """Return requests for the same prompt whose cache would hold something else."""
    changes: list[dict[str, Any]] = [{"salt": f"{request.salt} other"}]
    if request.max_loops:
        changes += [
            {"max_loops": request.max_loops - 1},
            {"rule": "change", "numbers": (0.5,)},
            {"rule": "gate", "numbers": (0.8,)},
            {"rule": "gate", "numbers": (0.3,), "min_loops": 2},
        ]
    return [replace(request, id=f"{i}", max_tokens=1, **change) for i, change in enumerate(changes)]


def _chunk(loops: int) -> int:
    from open_mythos.inference.oracle import CHUNK_LOOP_TOKENS
    from open_mythos.inference.scheduler import chunk_positions

    return chunk_positions(loops, CHUNK_LOOP_TOKENS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m open_mythos.inference.check", description="Check the engine on a model."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        one.add_argument("model", help="folder of a model")
        one.add_argument("--seed", type=int, default=0, help="seed of everything random")
        return one

    make = command("make", "write a small model with random weights, and a byte tokenizer")
    make.add_argument("--attn", choices=("gqa", "mla"), default="mla", help="attention")
    make.add_argument("--experts", type=int, default=8, help="routed experts; 0: dense layers")
    one = command("parity", "tokens, loops and ends are those of generate")
    one.add_argument("--requests", type=int, default=500, help="number of requests")
    one = command("schedules", "bits do not depend on other requests")
    one.add_argument("--cases", type=int, default=500, help="number of schedules")
    text = "switch a rule of exact mode off: the check must fail"
    one.add_argument("--break", dest="broken", choices=BREAKS, help=text)
    command("prefix", "bits do not depend on cached prefixes")
    one = command("preempt", "bits do not depend on being taken out")
    one.add_argument("--overcommit", action="store_true", help="always so; accepted for clarity")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    options = vars(_parser().parse_args(words))
    name, folder = options.pop("command"), options.pop("model")
    options.pop("overcommit", None)
    try:
        return _run(name, folder, options)
    except MythosError as error:
        print(error, file=sys.stderr)
        return 2


def _run(name: str, folder: str, options: dict[str, Any]) -> int:
    from open_mythos.hub.pretrained import from_pretrained
    from open_mythos.inference.oracle import write_checkpoint

    if name == "make":
        write_checkpoint(folder, **options)
        print(f"model: {folder}")
        return 0
    checks: dict[str, Callable[..., Findings]] = {
        "parity": parity, "schedules": schedules, "prefix": prefix, "preempt": preempt,
    }  # fmt: skip
    compared = failed = 0
    for finding in checks[name](from_pretrained(folder), **options):
        compared += 1
        if finding is not None:
            failed += 1
            print(finding)
    print(f"{name}: {compared} comparisons, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
