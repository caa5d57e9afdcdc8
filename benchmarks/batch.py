"""Decoding at several batch sizes: the weights are read once for all rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.clock import device, threads
from benchmarks.decoding import decoder
from benchmarks.measure import (
    FLOAT32_TOLERANCE,
    Finding,
    GateError,
    Measured,
    Times,
    alternate,
    distances,
    dtype_name,
    floor,
)  # fmt: skip
from benchmarks.models import FULL, Scale, build, config
from benchmarks.roofline import decode_work
from open_mythos.model.cache import KVCache
from open_mythos.model.mythos import OpenMythos

BFLOAT16_FROM = 4
"""Rows from which bfloat16 is to be the faster dtype."""
REPEATS, UNTIMED = 2, 1
DTYPES = (torch.float32, torch.bfloat16)


def title(scale: Scale) -> str:
    """Return a heading for the rows."""
    experts, chosen = scale.experts[0]
    return (
        f"decoding batches on {scale.contexts[0]} positions, dim {scale.dim}, {scale.n_loops} "
        f"loops, {experts} experts top-{chosen}, MLA, one thread"
    )


def rows(scale: Scale) -> Iterator[Measured]:
    """Tokens per second at every batch and dtype, then the dtypes against each other.

    Raises:
        GateError: A row of a batch has other logits than alone.
    """
    steps: dict[str, Callable[[], Tensor]] = {}
    errors = {}
    context = scale.contexts[0]
    held = context - (2 + (UNTIMED + REPEATS) * (scale.turns + 1))
    with threads(1):
        for dtype in DTYPES:
            model = build(scale, "mla", scale.experts[0]).to(dtype).eval()
            errors[dtype] = _gate(scale, model, dtype)
            for batch in scale.batches:
                steps[f"{dtype_name(dtype)} {batch}"] = decoder(
                    model, KVCache(context), batch, held, scale.n_loops
                )
        times = alternate(steps, turns=scale.turns, repeats=REPEATS, untimed=UNTIMED)
        for dtype in DTYPES:
            yield from _of(scale, dtype, times, errors[dtype])
    for batch in scale.batches:
        seconds = {dtype: times[f"{dtype_name(dtype)} {batch}"].wall for dtype in DTYPES}
        goal = 1.0 if scale is FULL and batch >= BFLOAT16_FROM else None
        yield Finding(
            f"float32 time over bfloat16 time, batch {batch}", "both",
            seconds[torch.float32] / seconds[torch.bfloat16], "x", goal=goal,
            error=errors[torch.bfloat16], numbers={"batch": batch},
            why=", ".join(f"{dtype_name(dtype)} {1e3 * value:.3g} ms"
                          for dtype, value in seconds.items()),
        )  # fmt: skip


def _of(
    scale: Scale, dtype: torch.dtype, times: dict[str, Times], error: float
) -> Iterator[Finding]:
    """Report tokens per second of one dtype, and relative to a single row."""
    cfg = config(scale, "mla", scale.experts[0])
    first = scale.batches[0] / times[f"{dtype_name(dtype)} {scale.batches[0]}"].wall
    for batch in scale.batches:
        seconds = times[f"{dtype_name(dtype)} {batch}"].wall
        work = decode_work(cfg, scale.n_loops, batch, scale.contexts[0], dtype.itemsize)
        yield Finding(
            f"batch {batch}", dtype_name(dtype), batch / seconds, "tok/s", seconds=seconds,
            error=error, floor=floor(work, dtype), why=f"{batch / seconds / first:.2f}x of batch 1",
            numbers={"batch": batch, "over_first": batch / seconds / first},
        )  # fmt: skip


def _gate(scale: Scale, model: OpenMythos, dtype: torch.dtype) -> float:
    """Check that the last row of the largest batch has the same logits as alone.

    In bfloat16 kernels add up in another order for another number of rows: three digits are left.
    """
    ids = torch.arange(scale.batches[-1], device=device()).unsqueeze(1) % model.cfg.vocab_size
    ids = torch.cat((ids, ids.flip(0), ids), dim=1)
    with torch.no_grad():
        together = model(ids, scale.n_loops, KVCache())[-1:]
        alone = model(ids[-1:], scale.n_loops, KVCache())
    error = max(distances([together], [alone]))
    allowed = FLOAT32_TOLERANCE if dtype == torch.float32 else 5e-2
    if not error <= allowed:
        raise GateError(f"batch: a row is off by {error:.2e} from itself alone")
    return error
