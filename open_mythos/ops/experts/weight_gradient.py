"""Weight gradient of stacked experts over all their uses in a loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from open_mythos.ops.backend import CHECKS, HALF_OR_FLOAT, triton_serves

MOST_LOOPS = 256
"""Most loops that one call of the kernel reads."""


def grouped_weight_gradient(
    xs: Sequence[Tensor], grads: Sequence[Tensor], ends: Sequence[Tensor], *, backend: str = "auto"
) -> Tensor:
    """Sum x^T grad over each expert's rows in all loops; returns (E, K, M).

    Accumulates in float32, loop by loop. The kernel reads the rows in place; the reference
    implementation needs a host-device sync.

    Args:
        xs: For each loop its rows in expert order, (rows, K).
        grads: For each loop the output gradients, (rows, M), in the dtype of ``xs``.
        ends: For each loop (E,) int32 end of each expert's rows.
        backend: "triton", "reference", or "auto": Triton on CUDA, the reference elsewhere.

    Raises:
        ConfigError: Unknown backend, or "triton" was requested and cannot serve the call.
    """
    if kernel_serves(xs, grads, backend):
        from open_mythos.ops.kernels.weight_gradient import weight_gradient

        ends_LE = torch.stack([ends_E.to(torch.int32) for ends_E in ends])
        return weight_gradient(
            [x.contiguous() for x in xs], [grad.contiguous() for grad in grads], ends_LE
        )
    return _reference(xs, grads, ends)


def kernel_serves(xs: Sequence[Tensor], grads: Sequence[Tensor], backend: str = "auto") -> bool:
    """Return whether the Triton kernel serves these rows, not the reference."""
    return triton_serves("grouped_weight_gradient", backend, xs[0], _problem(xs, grads))


def _problem(xs: Sequence[Tensor], grads: Sequence[Tensor]) -> str | None:
    """Return why the kernel cannot serve these rows, or None."""
    if torch.compiler.is_compiling():
        return "a call inside torch.compile"
    if xs[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph, whose replay would read a freed table of addresses"
    dtypes = {part.dtype for part in (*xs, *grads)}
    if len(dtypes) > 1 or not dtypes <= set(HALF_OR_FLOAT):
        return f"rows of {', '.join(sorted(map(str, dtypes)))}"
    if len(xs) > MOST_LOOPS:
        return f"{len(xs)} loops, more than {MOST_LOOPS}"
    return None


def _reference(xs: Sequence[Tensor], grads: Sequence[Tensor], ends: Sequence[Tensor]) -> Tensor:
    """Reference implementation: one matmul per expert and loop, accumulated in float32."""
    shape = (len(ends[0]), xs[0].shape[1], grads[0].shape[1])
    total_EKM = torch.zeros(shape, dtype=torch.float32, device=xs[0].device)
    for x, grad, ends_E in zip(xs, grads, ends, strict=True):
        stops = ends_E.tolist()
        for expert, (start, stop) in enumerate(zip([0, *stops], stops, strict=False)):
            total_EKM[expert] += x[start:stop].float().mT @ grad[start:stop].float()
    return total_EKM.to(xs[0].dtype)


def _small_case(device: torch.device) -> tuple[Tensor, Tensor]:
    """Compute an odd size with an empty expert by the kernel and by the reference."""
    generator = torch.Generator().manual_seed(0)
    xs, grads = (
        [torch.randn(rows, width, generator=generator).to(device) for rows in (37, 5)]
        for width in (40, 24)
    )
    ends = [torch.tensor(ends, dtype=torch.int32).to(device) for ends in ((20, 20, 37), (0, 4, 5))]
    return grouped_weight_gradient(xs, grads, ends, backend="triton"), _reference(xs, grads, ends)


CHECKS["grouped_weight_gradient"] = _small_case
