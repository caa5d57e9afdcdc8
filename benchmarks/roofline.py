"""What this machine allows: measured peaks, and the least time that follows from them.

The floor of a computation is the larger of two times: its FLOPs at the measured peak of a large
matrix product, and the bytes it has to read at the measured bandwidth. Caches make bandwidth
depend on how much is read again and again, so it is measured for several sizes, and a computation
gets that of its own size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from benchmarks.clock import clocked
from open_mythos.accounting import account
from open_mythos.config import MythosConfig

TRIES = 5
MEBIBYTE = 1 << 20
SIZES = {"cpu": (1, 4, 16, 64, 256), "cuda": (16, 1024)}
"""MiB read at a time; a GPU's second-level cache lies between its two."""
PRODUCT = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the square matrices that are multiplied."""
ELEMENT = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


@dataclass(frozen=True)
class Work:
    """What a computation needs at the very least."""

    flops: float
    bytes: float
    """Bytes read (and, for gradients, written)."""
    reused: float
    """Bytes that are read again and again: their number decides which cache may hold them."""


@dataclass(frozen=True)
class Floor:
    """The least time of some work on this machine."""

    seconds: float
    bound: str
    """ "products" or "memory"."""
    flops: float
    bytes: float
    peak: float
    """FLOPs per second of a large product."""
    bandwidth: float
    """Bytes per second."""


def floor(work: Work, dtype: torch.dtype, device: torch.device) -> Floor:
    """The least time of ``work`` in the number of threads in use now."""
    n = torch.get_num_threads()
    top = peak(dtype, device, n)
    rate = bandwidth(work.reused, device, n)
    by_products, by_memory = work.flops / top, work.bytes / rate
    return Floor(
        max(by_products, by_memory),
        "products" if by_products >= by_memory else "memory",
        work.flops,
        work.bytes,
        top,
        rate,
    )


@cache
def peak(dtype: torch.dtype, device: torch.device, threads: int) -> float:
    """FLOPs per second of the best of a few large square products."""
    n = PRODUCT[device.type]
    left, right = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _best(lambda: left @ right)


def bandwidth(reused: float, device: torch.device, threads: int) -> float:
    """Bytes per second of reading ``reused`` bytes again and again."""
    rates = read_rates(device, threads)
    fitting = [rate for size, rate in rates.items() if size * MEBIBYTE >= reused]
    return fitting[0] if fitting else rates[max(rates)]


@cache
def read_rates(device: torch.device, threads: int) -> dict[int, float]:
    """MiB -> bytes per second of reading so many, by a sum or by a product with a vector."""
    found = {}
    for size in SIZES[device.type]:
        x = torch.ones(size * MEBIBYTE // 4, device=device)
        matrix, vector = x.view(-1, 1024), torch.ones(1024, device=device)
        seconds = min(_best(x.sum), _best(partial(torch.mv, matrix, vector)))
        found[size] = size * MEBIBYTE / seconds
    return found


@cache
def copy_rate(device: torch.device, threads: int) -> float:
    """Bytes per second, read and written, of copying the largest size."""
    x = torch.ones(max(SIZES[device.type]) * MEBIBYTE // 4, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / _best(lambda: y.copy_(x))


def _best(call: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls: limits are what is possible, not what is usual."""
    call()
    return min(clocked(call)[0] for _ in range(TRIES))


def describe(device: torch.device) -> dict[str, Any]:
    """All limits in the threads in use now, JSON-ready."""
    n = torch.get_num_threads()
    return {
        "threads": n,
        "peak_flops": {name: peak(getattr(torch, name), device, n)
                       for name in ("float32", "bfloat16")},
        "read_bytes_per_second": {f"{size} MiB": rate
                                  for size, rate in read_rates(device, n).items()},
        "copy_bytes_per_second": copy_rate(device, n),
    }  # fmt: skip


def training_work(cfg: MythosConfig, n_loops: int, batch: int, tokens: int) -> Work:
    """A forward and a backward pass: every weight is read in both, every gradient written once."""
    count = account(cfg, n_loops)
    flops = count.training_flops(context=tokens) * batch * tokens
    weights = 4 * count.parameters
    return Work(flops, 3 * weights, weights)


def forward_work(cfg: MythosConfig, n_loops: int, batch: int, tokens: int, size: int) -> Work:
    """A forward pass over whole sequences: every weight of ``size`` bytes is read once."""
    count = account(cfg, n_loops)
    flops = count.forward_flops(context=tokens) * batch * tokens
    return Work(flops, size * count.parameters, size * count.parameters)


def decode_work(cfg: MythosConfig, n_loops: int, batch: int, context: int, size: int) -> Work:
    """A token for each of ``batch`` rows: looped weights and the cache are read at every loop."""
    count = account(cfg, n_loops)
    once, per_loop = decode_weights(cfg, batch)
    cached = batch * context * count.cache_bytes(element_size=size)
    slots = cfg.cache_slots(n_loops)
    return Work(
        batch * count.decode_flops(context=context),
        size * (once + n_loops * per_loop) + cached,
        size * per_loop + cached / slots,
    )


def decode_weights(cfg: MythosConfig, rows: int) -> tuple[float, float]:
    """Weights that decoding ``rows`` tokens reads outside the loop, and in every loop.

    Of the experts those count that some row is expected to choose, if all are equally likely.
    """
    stored = account(cfg, 1).stored
    once: float = stored["prelude"] + stored["coda"] + cfg.vocab_size * cfg.dim + cfg.dim
    looped: float = stored["recurrent"] - (cfg.max_loop_iters - 1) * 2 * cfg.dim * cfg.lora_rank
    if cfg.n_experts:
        idle = cfg.n_experts * (1 - cfg.n_experts_per_tok / cfg.n_experts) ** rows
        looped -= cfg.recurrent_layers * idle * 3 * cfg.dim * cfg.expert_dim
    return once, looped
