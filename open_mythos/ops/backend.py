"""Selects the implementation that serves a call of an op.

A Triton kernel is never trusted blindly: before "auto" first picks one on a device, it runs a small
case there and must agree with the reference implementation. A kernel that fails or disagrees is
not used on that device, and a warning says so.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from open_mythos.checks import pick
from open_mythos.devices import constant_if_compiled
from open_mythos.errors import ConfigError

logger = logging.getLogger(__name__)

Implementation = TypeVar("Implementation")

HALF_OR_FLOAT = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the Triton kernels read."""

CHECKS: dict[str, Callable[[torch.device], tuple[Tensor, Tensor]]] = {}
"""By op: float32 result of a small case on a device, by the kernel and by the reference."""
TOLERANCE = 1e-3
"""Largest relative error of a kernel's result; matmuls may be rounded to TensorFloat-32."""


def pick_backend(
    op: str, backend: str, table: Mapping[str, Implementation], *, where: str = "backend"
) -> Implementation:
    """Return the implementation of ``op`` called ``backend``; each choice is logged once.

    The caller has already resolved "auto". ``where`` names the field or argument that chose.

    Raises:
        ConfigError: ``table`` has no such backend.
    """
    pick(("auto", *table), backend, where, what=f"{op} backend", fix=f'set {where} to "auto"')
    if not torch.compiler.is_compiling():
        _log_once(op, backend)
    return table[backend]


def triton_serves(op: str, backend: str, tensor: Tensor, problem: str | None) -> bool:
    """Return whether the Triton kernel of ``op``, not its reference, serves a call.

    "auto" takes the kernel where it can run on a GPU and agrees with the reference there.

    Args:
        op: Name of the op.
        backend: "triton", "reference" or "auto".
        tensor: One of the call's tensors; its device decides.
        problem: Why the kernel cannot serve the dtypes or shapes of this call, or None.

    Raises:
        ConfigError: Unknown backend, or "triton" was requested and cannot serve the call.
    """
    if backend == "auto":
        fits = problem is None and tensor.is_cuda and _kernel_problem(op, tensor.device) is None
        backend = "triton" if fits else "reference"
    elif backend == "triton":
        problem = problem or _machine_problem(tensor.device)
        if problem is not None:
            raise ConfigError(
                f"the Triton kernel of {op} cannot serve this call", where="backend",
                value=problem,
                allowed="a call on a CUDA device that the kernel supports",
                fix='use backend="auto"',
            )  # fmt: skip
    return pick_backend(op, backend, {"triton": True, "reference": False})


@constant_if_compiled
def _machine_problem(device: torch.device) -> str | None:
    """Return why no kernel can run on ``device``, or None."""
    return _hardware_problem(device)


@constant_if_compiled
def _kernel_problem(op: str, device: torch.device) -> str | None:
    """Return why "auto" does not pick the kernel of ``op`` on ``device``, or None."""
    return _hardware_problem(device) or _small_case_problem(op, device)


@cache
def _small_case_problem(op: str, device: torch.device) -> str | None:
    """Return how the kernel of ``op`` failed its small case on ``device``, or None."""
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            got, expected = CHECKS[op](device)
        error = float((got - expected).norm() / expected.norm())
        problem = None if error <= TOLERANCE else f"off by {error:.1e} (relative)"
    except Exception as failure:  # any compiler or driver error: the reference still works
        problem = f"{type(failure).__name__}: {failure}"
    if problem is not None:
        logger.warning(
            "using the reference of %s on %s instead of the Triton kernel: %s", op, device, problem
        )
    return problem


@cache
def _hardware_problem(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda":
        import triton

        # Triton's interpreter runs kernels in Python on any device, for tests
        return None if triton.knobs.runtime.interpret else f"tensors on {device}"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else "compute capability {}.{}".format(*capability)


@cache
def _log_once(op: str, backend: str) -> None:
    logger.info("%s backend: %s", op, backend)
