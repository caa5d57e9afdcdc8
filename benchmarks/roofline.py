"""Roofline model: the least time of a computation, from measured peaks of this machine.

The floor is the larger of two times: FLOPs at the measured peak of a large matmul, and bytes at the
measured bandwidth. Because of caches, bandwidth depends on the size of the working set, so it is
measured at several sizes and the size of the computation selects one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from benchmarks.clock import clocked
from open_mythos.accounting import Accounting, account
from open_mythos.config import MythosConfig

TRIES = 5
MEBIBYTE = 1 << 20
SIZES = {"cpu": (1, 4, 16, 64, 256), "cuda": (16, 1024)}
"""Working sets in MiB; a GPU's L2 cache is between its two sizes."""
PRODUCT = {"cpu": 2048, "cuda": 8192}
"""Size of the square matmul that measures peak FLOPs."""


@dataclass(frozen=True)
class Work:
    """Lower bounds on the cost of a computation."""

    flops: float
    bytes: float
    """Bytes read (and, for gradients, written)."""
    reused: float
    """Working set in bytes, which decides the cache that may hold it."""


@dataclass(frozen=True)
class Floor:
    """Least time of some work on this machine."""

    seconds: float
    bound: str
    """ "matmuls" or "memory"."""
    flops: float
    bytes: float
    peak: float
    """FLOPs per second of a large matmul."""
    bandwidth: float
    """Bytes per second."""


def floor(work: Work, dtype: torch.dtype, device: torch.device) -> Floor:
    """Return the least time of ``work`` with the current number of threads."""
    n = torch.get_num_threads()
    top = peak(dtype, device, n)
    rate = bandwidth(work.reused, device, n)
    by_matmuls, by_memory = work.flops / top, work.bytes / rate
    return Floor(
        max(by_matmuls, by_memory),
        "matmuls" if by_matmuls >= by_memory else "memory",
        work.flops,
        work.bytes,
        top,
        rate,
    )


@cache
def peak(dtype: torch.dtype, device: torch.device, threads: int) -> float:
    """Measure FLOPs per second: the best of a few large square matmuls."""
    n = PRODUCT[device.type]
    left, right = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _best(lambda: left @ right)


def bandwidth(reused: float, device: torch.device, threads: int) -> float:
    """Return bytes per second when repeatedly reading ``reused`` bytes."""
    rates = read_rates(device, threads)
    fitting = [rate for size, rate in rates.items() if size * MEBIBYTE >= reused]
    return fitting[0] if fitting else rates[max(rates)]


@cache
def read_rates(device: torch.device, threads: int) -> dict[int, float]:
    """Measure MiB -> bytes per second, the better of a sum and a matrix-vector product."""
    found = {}
    for size in SIZES[device.type]:
        x = torch.ones(size * MEBIBYTE // 4, device=device)
        matrix, vector = x.view(-1, 1024), torch.ones(1024, device=device)
        seconds = min(_best(x.sum), _best(partial(torch.mv, matrix, vector)))
        found[size] = size * MEBIBYTE / seconds
    return found


@cache
def copy_rate(device: torch.device, threads: int) -> float:
    """Measure bytes per second, read plus written, of copying the largest size."""
    x = torch.ones(max(SIZES[device.type]) * MEBIBYTE // 4, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / _best(lambda: y.copy_(x))


def _best(call: Callable[[], object]) -> float:
    """Return seconds of the fastest of a few calls."""
    call()
    return min(clocked(call)[0] for _ in range(TRIES))


def describe(device: torch.device) -> dict[str, Any]:
    """Return all peaks with the current number of threads, JSON-ready."""
    n = torch.get_num_threads()
    return {
        "threads": n,
        "peak_flops": {name: peak(getattr(torch, name), device, n)
                       for name in ("float32", "bfloat16")},
        "read_bytes_per_second": {f"{size} MiB": rate
                                  for size, rate in read_rates(device, n).items()},
        "copy_bytes_per_second": copy_rate(device, n),
    }  # fmt: skip


def counted(cfg: MythosConfig, n_loops: int) -> Accounting:
    """Return the accounting of a configuration; equal ones are counted once."""
    key = repr(cfg), n_loops
    if key not in _COUNTED:
        _COUNTED[key] = account(cfg, n_loops)
    return _COUNTED[key]


_COUNTED: dict[tuple[str, int], Accounting] = {}


def training_work(cfg: MythosConfig, n_loops: int, batch: int, tokens: int) -> Work:
    """Return the work of forward and backward: weights read in both, gradients written once."""
    count = counted(cfg, n_loops)
    flops = count.training_flops(context=tokens) * batch * tokens
    weights = 4 * count.parameters
    return Work(flops, 3 * weights, weights)


def forward_work(cfg: MythosConfig, n_loops: int, batch: int, tokens: int, size: int) -> Work:
    """Return the work of a forward pass: each weight, of ``size`` bytes, is read once."""
    count = counted(cfg, n_loops)
    flops = count.forward_flops(context=tokens) * batch * tokens
    return Work(flops, size * count.parameters, size * count.parameters)


def decode_work(cfg: MythosConfig, n_loops: int, batch: int, context: int, size: int) -> Work:
    """Return the work of one token per row: looped weights and the cache are read per loop."""
    count = counted(cfg, n_loops)
    once, per_loop = decode_weights(cfg, batch)
    cached = batch * context * count.cache_bytes(element_size=size)
    slots = cfg.cache_slots(n_loops)
    return Work(
        batch * count.decode_flops(context=context),
        size * (once + n_loops * per_loop) + cached,
        size * per_loop + cached / slots,
    )


def decode_weights(cfg: MythosConfig, rows: int) -> tuple[float, float]:
    """Return the weights that decoding ``rows`` tokens reads outside the loop, and per loop.

    Counts the expected number of distinct experts chosen, if all are equally likely.
    """
    stored = counted(cfg, 1).stored
    once: float = stored["prelude"] + stored["coda"] + cfg.vocab_size * cfg.dim + cfg.dim
    looped: float = stored["recurrent"] - (cfg.max_loop_iters - 1) * 2 * cfg.dim * cfg.lora_rank
    if cfg.n_experts:
        idle = cfg.n_experts * (1 - cfg.n_experts_per_tok / cfg.n_experts) ** rows
        looped -= cfg.recurrent_layers * idle * 3 * cfg.dim * cfg.expert_dim
    return once, looped
