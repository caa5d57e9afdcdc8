"""Device under test: selection, timing, memory, deadlines and profiling on a CPU or GPU."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch.profiler import ProfilerActivity, profile

from open_mythos.devices import resolve_device

_KERNELS = {
    "attention": re.compile(r"flash|fmha|attention|attn", re.IGNORECASE),
    "matmuls": re.compile(
        r"^aten::(mm|bmm|addmm|baddbmm|mv|addmv|dot|_grouped_mm)$|gemm|cutlass|nvjet|cublas|xmma",
        re.IGNORECASE,
    ),
}
CPU = torch.device("cpu")
_device: ContextVar[torch.device] = ContextVar("device", default=CPU)


class OutOfTime(BaseException):
    """Raised at a suite's deadline; not an Exception, so that no handler swallows it."""


def device() -> torch.device:
    """Return the device under test."""
    return _device.get()


@contextlib.contextmanager
def on(name: str) -> Iterator[torch.device]:
    """Select the device under test.

    Raises:
        ConfigError: ``name`` is not a device.
        EnvironmentError_: The device is not available.
    """
    chosen = resolve_device(name)
    token = _device.set(chosen)
    try:
        yield chosen
    finally:
        _device.reset(token)


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """Compute with ``n`` threads inside.

    Small ops on many threads measure thread wake-up (about 90 us with OMP_WAIT_POLICY=PASSIVE), not
    the work, so every implementation of them is timed on one thread.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronize() -> None:
    """Synchronize the host with the device."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def release() -> None:
    """Free unused memory."""
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()


def clocked(call: Callable[[], object], repeats: int = 1) -> tuple[float, float]:
    """Return wall-clock seconds on the device and CPU seconds of this process, per call."""
    cpu_start = time.process_time()
    if device().type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        wall = begin.elapsed_time(end) / 1e3
    else:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        wall = time.perf_counter() - start
    return wall / repeats, (time.process_time() - cpu_start) / repeats


@contextlib.contextmanager
def deadline(moment: float) -> Iterator[None]:
    """Raise :class:`OutOfTime` inside as soon as ``time.monotonic()`` reaches ``moment``.

    Uses SIGALRM, which interrupts a long row; main thread only.
    """
    left = moment - time.monotonic()
    if left <= 0:
        raise OutOfTime
    if left == float("inf"):
        yield
        return

    def over(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, left)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def where_time_goes(call: Callable[[], object]) -> dict[str, float]:
    """Profile one call and return the share of time by kind of kernel.

    "matmuls" are matmuls, "attention" fused attention kernels, "other" the rest; on a GPU "idle"
    is the share of wall time in which no kernel ran.
    """
    cuda = device().type == "cuda"
    call()
    synchronize()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        call()
        synchronize()
        wall = 1e6 * (time.perf_counter() - start)
    found = {"matmuls": 0.0, "attention": 0.0, "other": 0.0}
    for event in profiler.key_averages():
        if cuda:
            if event.device_type.name != "CUDA":
                continue
            taken = event.self_device_time_total
        else:
            taken = event.self_cpu_time_total
        kind = next((kind for kind, known in _KERNELS.items() if known.search(event.key)), "other")
        found[kind] += taken
    total = sum(found.values()) or 1.0  # no PyTorch op was called
    if not cuda:
        return {kind: taken / total for kind, taken in found.items()}
    shares = {kind: taken / wall for kind, taken in found.items()}
    return shares | {"idle": max(0.0, 1 - total / wall)}


def shares_text(shares: dict[str, float]) -> str:
    """Format the shares."""
    return ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the peak memory of ``call``, in bytes above the level before it.

    On a CPU it is the running sum of allocations in PyTorch's profiler, hence deterministic.
    """
    if device().type == "cuda":
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events()
              if event.name() == "[memory]"]  # fmt: skip
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def wait_policy() -> str:
    """Return OMP_WAIT_POLICY, or a description of the default."""
    return os.environ.get("OMP_WAIT_POLICY") or "default (threads spin a while)"
