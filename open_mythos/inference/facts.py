"""What a served model is: the answer of the engine's process when it is ready."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from open_mythos.errors import EnvironmentError_
from open_mythos.files import hash_blocks, read_text
from open_mythos.hub.places import CONFIG_FILE, model_directory
from open_mythos.inference.engine import Engine
from open_mythos.inference.request import RULES, Request, Token
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.layers.halting import ACTHalting
from open_mythos.model.mythos import OpenMythos
from open_mythos.ops.sampling import SamplingParams
from open_mythos.run_folder import validated_range

SPEED_CONTEXT = 64
"""Context of an engine that measures speed."""
_PROMPT, _NEW = 15, 8
"""Tokens of the requests that measure speed: too few to be kept as a prefix."""


def served_facts(
    model: CausalLM, engine: Engine, checkpoint: str, bits: str, weights: str = "raw"
) -> dict[str, Any]:
    """Return facts of a model and its engine, of JSON types.

    Args:
        model: The model.
        engine: Its engine.
        checkpoint: Where the model was loaded from.
        bits: How it was quantized; empty if it was not.
        weights: "averaged" or "raw".

    Returns:
        ``fingerprint`` (hexadecimal, of weights and quantization), ``weights``, ``dense``,
        ``vocab_size``, ``context``, ``trained_depth``, ``validated_depth`` ([low, high], None if
        unknown), ``max_loops``, ``rules``, ``gate_threshold``, ``slots``, ``pages``, ``exact``,
        ``device``.
    """
    folder, looped = model_directory(checkpoint), isinstance(model, OpenMythos)
    validated = validated_range(folder) if looped else None
    gate = next((each for each in model.modules() if isinstance(each, ACTHalting)), None)
    return {
        "fingerprint": _fingerprint(folder, bits, weights),
        "weights": weights,
        "dense": not looped,
        "vocab_size": model.cfg.vocab_size,
        "context": engine.context,
        "trained_depth": model.cfg.max_loop_iters if looped else None,
        "validated_depth": None if validated is None else list(validated),
        "max_loops": engine.max_loops,
        "rules": list(RULES[1:]) if looped else [],
        "gate_threshold": None if gate is None else gate.threshold,
        "slots": engine.slots,
        "pages": engine.stats()["pages"],
        "exact": engine.exact,
        "device": model.final_norm.weight.device.type,
    }


def measured_speed(
    engine: Engine, seconds: float = 1.0, clock: Callable[[], float] = time.monotonic
) -> float:
    """Return loop-tokens per second with all slots in use, prompts included.

    Args:
        engine: An idle engine; its statistics count the requests, so do not serve with it.
        seconds: About how long to measure; one tick at least.
        clock: Seconds.
    """
    loops, draw = max(engine.max_loops, 1), random.Random(0)
    length = max(1, min(_PROMPT, engine.context // 2))
    n_new = min(_NEW, engine.context - length)

    def add(id: str, most: int) -> None:
        prompt = (draw.randrange(engine.model.cfg.vocab_size) for _ in range(length))
        engine.add(
            Request(id, tuple(prompt), most, max_loops=engine.max_loops, min_loops=loops, key=1)
        )

    add("warm", min(2, n_new))
    while engine.busy:
        engine.step()
    for i in range(engine.slots):
        add(str(i), n_new)
    start, done = clock(), 0
    prompts: set[str] = set()
    while engine.busy and (not done or clock() - start < seconds):
        for event in engine.step():
            if isinstance(event, Token):
                done += max(event.loops, 1)
                prompts.add(event.id)
    # the first new token is chosen by the loops of the prompt's last one
    return (done + len(prompts) * (length - 1) * loops) / (clock() - start)


def self_check(engine: Engine, n_tokens: int = 8) -> None:
    """Run a prompt alone and among others.

    Raises:
        EnvironmentError_: In exact mode, the two runs differ in a bit on this machine.
    """
    length = max(1, min(engine.context // 2, 24))
    ids = [i * 7919 % engine.model.cfg.vocab_size for i in range(length)]
    params = SamplingParams(min(n_tokens, engine.context - length), temperature=0.0)
    crowd = [ids[: 1 + i % length] for i in range(engine.slots)]
    (alone,) = engine.generate([ids], params, logprobs=1)
    among = engine.generate([ids, *crowd], params, logprobs=1)[0]
    if engine.exact and (among.logprobs, among.top) != (alone.logprobs, alone.top):
        raise EnvironmentError_(
            "log-probabilities depend on other requests on this machine", where="exact",
            value=[alone.logprobs, among.logprobs], allowed="equal bits",
            fix="start the engine with exact=False (--engine.exact false)",
        )  # fmt: skip


def _fingerprint(folder: Path, bits: str, weights: str) -> str:
    kind = bits if weights == "raw" else f"{bits} {weights}"
    digest = hashlib.sha256((read_text(folder / CONFIG_FILE) + kind).encode())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update("".join([path.name, *hash_blocks(path)]).encode())
    return digest.hexdigest()
