"""The weight gradient of stacked experts that a loop used several times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from open_mythos.errors import ConfigError
from open_mythos.ops.backend import CHECKS, HALF_OR_FLOAT, triton_serves

MOST_LOOPS = 256
"""Loops that one call of the kernel reads."""


def grouped_weight_gradient(
    xs: Sequence[Tensor], grads: Sequence[Tensor], ends: Sequence[Tensor], *, backend: str = "auto"
) -> Tensor:
    """(E, K, M): for each expert, the sum over its rows in all loops of x^T grad.

    The sum is accumulated in float32, loop by loop in the order given. The kernel reads the rows
    where they lie; the plain twin waits for the counts, and is for checking.

    Args:
        xs: For each loop its rows in expert order, (rows, K).
        grads: For each loop the gradients of its products, (rows, M), of the dtype of ``xs``.
        ends: For each loop (E,) where the rows of each expert end, int32.
        backend: "auto" is the Triton kernel on CUDA and the plain twin elsewhere; or "triton",
            "reference".

    Returns:
        In the dtype of ``xs``.

    Raises:
        ConfigError: Shapes that do not belong together, an unknown backend, or a kernel asked for
            by name that cannot serve the call.
        EnvironmentError_: The kernel was asked for by name and Triton is not installed.
    """
    _check(xs, grads, ends)
    if _serves(xs, grads, backend):
        from open_mythos.ops.kernels.weight_gradient import weight_gradient

        ends_LE = torch.stack([ends_E.to(torch.int32) for ends_E in ends])
        return weight_gradient(
            [x.contiguous() for x in xs], [grad.contiguous() for grad in grads], ends_LE
        )
    return _reference(xs, grads, ends)


def kernel_serves(xs: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
    """Whether "auto" would be the kernel: on a GPU, with Triton, for rows that it can read."""
    return _serves(xs, grads, "auto")


def _serves(xs: Sequence[Tensor], grads: Sequence[Tensor], backend: str) -> bool:
    return triton_serves("grouped_weight_gradient", backend, xs[0], _problem(xs, grads))


def _problem(xs: Sequence[Tensor], grads: Sequence[Tensor]) -> str | None:
    """Why the kernel cannot serve these rows, or None."""
    if torch.compiler.is_compiling():
        return "a call inside torch.compile"
    if xs[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph, whose replay would read a table of addresses that is gone"
    dtypes = {part.dtype for part in (*xs, *grads)}
    if len(dtypes) > 1 or not dtypes <= set(HALF_OR_FLOAT):
        return f"rows of {', '.join(sorted(map(str, dtypes)))}"
    if len(xs) > MOST_LOOPS:
        return f"{len(xs)} loops, more than {MOST_LOOPS}"
    return None


def _reference(xs: Sequence[Tensor], grads: Sequence[Tensor], ends: Sequence[Tensor]) -> Tensor:
    """The plain twin: one product per expert and loop, added up in float32."""
    shape = (len(ends[0]), xs[0].shape[1], grads[0].shape[1])
    total_EKM = torch.zeros(shape, dtype=torch.float32, device=xs[0].device)
    for x, grad, ends_E in zip(xs, grads, ends, strict=True):
        stops = ends_E.tolist()
        for expert, (start, stop) in enumerate(zip([0, *stops], stops, strict=False)):
            total_EKM[expert] += x[start:stop].float().mT @ grad[start:stop].float()
    return total_EKM.to(xs[0].dtype)


def _small_case(device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """The gradient by the kernel and by the plain form, for an odd size with an empty expert."""
    generator = torch.Generator().manual_seed(0)
    xs, grads = (
        [torch.randn(rows, width, generator=generator).to(device) for rows in (37, 5)]
        for width in (40, 24)
    )
    ends = [torch.tensor(ends, dtype=torch.int32).to(device) for ends in ((20, 20, 37), (0, 4, 5))]
    got, plain = (
        grouped_weight_gradient(xs, grads, ends, backend=name) for name in ("triton", "reference")
    )
    return [got], [plain]


CHECKS["grouped_weight_gradient"] = _small_case


def _check(xs: Sequence[Tensor], grads: Sequence[Tensor], ends: Sequence[Tensor]) -> None:
    sides = (xs, grads, ends)
    rows = all(len(x) == len(grad) for x, grad in zip(xs, grads, strict=False))
    widths = all(len({part.shape[1:] for part in side}) == 1 for side in (xs, grads))
    if (
        len({len(side) for side in sides}) > 1
        or not rows
        or not widths
        or len({len(ends_E) for ends_E in ends}) != 1
    ):
        raise ConfigError(
            "rows, gradients and ends do not belong together", where="grouped_weight_gradient",
            value=tuple([tuple(part.shape) for part in side] for side in sides),
            allowed="for each loop (rows, K), (rows, M) and (E,); at least one loop",
        )  # fmt: skip
