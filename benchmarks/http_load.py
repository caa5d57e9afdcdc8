"""The HTTP server under load, against the engine without a server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from benchmarks.clock import threads
from benchmarks.load_client import Load, closed, percentile, poisson
from benchmarks.measure import Finding, Measured
from benchmarks.models import FULL as FULL_SCALE
from benchmarks.models import Scale, config, noisy, random_ids
from open_mythos.hub import save_pretrained
from open_mythos.inference.engine import Engine
from open_mythos.model.mythos import OpenMythos
from open_mythos.ops.sampling import SamplingParams
from open_mythos.tokenizer import ByteTokenizer

LOADS = (0.25, 0.5, 0.8, 1.2)
"""Shares of the capacity, which is what 16 connections without pause reach."""
NEW_TOKENS, OVERLOAD, WHOLE = 32, 10.0, 1 << 20


def title(scale: Scale) -> str:
    """Return a heading for the rows."""
    n_slots, n_prompt, _, seconds = _sizes(scale)
    return (
        f"open-mythos serve, dim {_dim(scale)}, 8 loops, 16 experts top-2, {n_slots} slots, "
        f"prompts of {n_prompt} tokens, {NEW_TOKENS} new ones, random arrivals for {seconds:g} s "
        "each; engine on one thread, client on the same machine; seconds of wall clock"
    )


def _dim(scale: Scale) -> int:
    return 256 if scale is FULL_SCALE else 64


def _sizes(scale: Scale) -> tuple[int, int, int, float]:
    """Return slots, prompt tokens, requests to find the capacity, seconds of a load."""
    return (16, 512, 96, 40.0) if scale is FULL_SCALE else (4, 24, 8, 1.0)


def rows(scale: Scale) -> Iterator[Measured]:
    """Measure the server idle, at several loads, overloaded, and without chunks of prompts."""
    n_slots, n_prompt, n_closed, seconds = _sizes(scale)
    sized = replace(scale, dim=_dim(scale), n_loops=8)
    cfg = replace(config(sized, "mla", (16, 2)), vocab_size=ByteTokenizer().vocab_size,
                  max_seq_len=1024)  # fmt: skip
    model = noisy(lambda: OpenMythos(cfg)).eval()
    bodies = _bodies(cfg.vocab_size, n_prompt)
    goals = scale is FULL_SCALE
    options = {"slots": n_slots, "context": n_prompt + NEW_TOKENS}
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        with serving(folder, options) as url:
            idle = closed(url, _take(bodies, 12), 1)
            yield _finding("idle", idle, "TTFT p50")
            full = closed(url, _take(bodies, n_closed), n_slots)
            yield from _throughput(model, options, full, n_closed, goals)
            rate = len(full.served) / full.seconds
            for share in LOADS:
                n = max(4, round(share * rate * seconds))
                load = poisson(url, _take(bodies, n), share * rate, seed=7)
                yield from _under_load(share, load, idle, goals and share == 0.5)
                if share == 0.5:
                    half = load
            yield from _overload(url, bodies, rate, full, seconds, n_slots, goals)
        with serving(folder, options | {"chunk_loop_tokens": WHOLE}) as url:
            n = len(half.samples)
            whole = poisson(url, _take(_bodies(cfg.vocab_size, n_prompt), n), 0.5 * rate, seed=7)
    chunked, alone = half.numbers()["ITL p99"], whole.numbers()["ITL p99"]
    yield Finding(
        "50 % load: ITL p99 with prompts in chunks over whole prompts", "float32", chunked / alone,
        "x", goal=0.6 if goals else None, at_most=True, numbers=whole.numbers(),
        why=f"{1e3 * chunked:.0f} ms and {1e3 * alone:.0f} ms",
    )  # fmt: skip


def _bodies(vocabulary: int, n_prompt: int) -> Iterator[dict[str, Any]]:
    """Yield requests, no two with the same prompt."""
    seed = 0
    while True:
        seed += 1
        ids = random_ids(1, n_prompt, vocabulary - 8, seed=seed)[0].tolist()
        yield {
            "prompt": ids, "max_tokens": NEW_TOKENS, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}, "return_token_ids": True,
        }  # fmt: skip


def _take(bodies: Iterator[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    return [next(bodies) for _ in range(n)]


def _finding(name: str, load: Load, key: str) -> Finding:
    numbers = load.numbers()
    shown = ", ".join(f"{k} {1e3 * v:.0f} ms" for k, v in numbers.items() if " p" in k)
    return Finding(
        f"{name}: {key}", "float32", 1e3 * numbers[key], "ms", numbers=numbers,
        why=f"{shown}; goodput {numbers['goodput, requests/s']:.2f} of "
        f"{numbers['requests'] / load.seconds:.2f} requests/s",
    )  # fmt: skip


def _under_load(share: float, load: Load, idle: Load, goals: bool) -> Iterator[Finding]:
    name = f"{share:.0%} load".replace("%", " %")
    yield _finding(name, load, "TTFT p99")
    if not goals:
        return
    first = idle.numbers()["TTFT p50"]
    for percent, most in ((50, 1.5), (99, 4.0)):
        value = load.numbers()[f"TTFT p{percent}"] / first
        yield Finding(
            f"{name}: TTFT p{percent} over an idle server's p50", "float32", value, "x",
            goal=most, at_most=True, numbers=load.numbers(),
            why=f"an idle server's p50 is {1e3 * first:.0f} ms",
        )  # fmt: skip


def _throughput(
    model: OpenMythos, options: dict[str, Any], full: Load, n: int, goals: bool
) -> Iterator[Finding]:
    """Compare tokens per second with those of the engine in this process."""
    generator = _bodies(model.cfg.vocab_size, options["context"] - NEW_TOKENS)
    prompts = [body["prompt"] for body in _take(generator, n)]
    with threads(1):
        engine = Engine(model, **options, max_queued=n)
        engine.generate(prompts[:1], SamplingParams(2, temperature=0.0))  # warm-up
        begin = time.perf_counter()
        done = engine.generate(prompts, SamplingParams(NEW_TOKENS, temperature=0.0))
        seconds = time.perf_counter() - begin
    bare = sum(len(each.tokens) for each in done) / seconds
    yield Finding(
        "tokens per second over HTTP, 16 streams, over those of the engine alone", "float32",
        full.tokens_per_second / bare, "x", goal=0.9 if goals else None, numbers=full.numbers(),
        why=f"{full.tokens_per_second:.0f} and {bare:.0f} tokens/s",
    )  # fmt: skip


def _overload(
    url: str, bodies: Iterator[dict[str, Any]], rate: float, full: Load, seconds: float,
    n_slots: int, goals: bool,
) -> Iterator[Finding]:  # fmt: skip
    """Ten times the capacity, then the usual load again."""
    n = max(8, round(OVERLOAD * rate * seconds))
    load = poisson(url, _take(bodies, n), OVERLOAD * rate, seed=8)
    refused = [each.end - each.begin for each in load.of_status(429)]
    accepted = load.of_status(200)
    lost = sum(not each.complete for each in accepted)
    others = len(load.samples) - len(refused) - len(accepted)
    name, numbers = "10x overload", load.numbers()
    yield Finding(
        f"{name}: p99 of a refusal", "float32", 1e3 * percentile(refused or [0.0], 99), "ms",
        goal=50.0 if goals else None, at_most=True, numbers=numbers,
        why=f"{len(refused)} of {len(load.samples)} requests refused",
    )  # fmt: skip
    yield Finding(
        f"{name}: requests lost, or refused without Retry-After", "float32",
        float(lost + others + sum(not each.retry_after for each in load.of_status(429))), "",
        goal=0.0 if goals else None, at_most=True, numbers=numbers,
    )  # fmt: skip
    yield Finding(
        f"{name}: tokens per second over those at capacity", "float32",
        load.tokens_per_second / full.tokens_per_second, "x", goal=0.9 if goals else None,
        numbers=numbers,
    )  # fmt: skip
    time.sleep(2)
    after = closed(url, _take(bodies, 3 * n_slots), n_slots)
    yield Finding(
        f"{name}: tokens per second 2 s later over those at capacity", "float32",
        after.tokens_per_second / full.tokens_per_second, "x", goal=0.9 if goals else None,
        numbers=after.numbers(),
    )  # fmt: skip


@contextlib.contextmanager
def serving(folder: str, options: dict[str, Any]) -> Iterator[str]:
    """Serve the model of a folder; yield the address.

    Args:
        folder: A model.
        options: Of the engine.
    """
    port_file = Path(folder) / "port"
    port_file.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "open_mythos", "serve", folder, "--port", "0", "--port_file",
        str(port_file), "--tokenizer", "byte", "--device", "cpu", "--allow_unvalidated_depth",
        "true", "--engine", json.dumps(options),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            yield _address(server, port_file)
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read()[-4000:])
            raise
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def _address(server: subprocess.Popen[bytes], port_file: Path) -> str:
    end = time.monotonic() + 120
    while time.monotonic() < end and server.poll() is None:
        if port_file.is_file() and (text := port_file.read_text().strip()):
            url = f"http://127.0.0.1:{text}"
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health/ready").status_code == 200:
                    return url
        time.sleep(0.1)
    raise RuntimeError("the server did not become ready")
