"""Whether a kernel of ours serves a call, or its plain twin does.

No kernel is taken on trust. Before "auto" first picks one on a device, it computes a small case
there and has to agree with its twin; one that fails or disagrees is never picked, and says so.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from open_mythos.errors import ConfigError, EnvironmentError_

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "reference")
HALF_OR_FLOAT = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels read."""

Results = Sequence[Tensor]
CHECKS: dict[str, Callable[[torch.device], tuple[Results, Results]]] = {}
"""By operation: float32 results of the kernel for a small case on a device, and of its twin."""
TOLERANCE = 1e-3
"""Largest relative error of a kernel's result; products may be rounded to TensorFloat-32."""


def triton_serves(op: str, backend: str, tensor: Tensor, problem: str | None) -> bool:
    """Whether the Triton kernel of ``op`` serves a call; its plain twin does otherwise.

    Args:
        op: Name of the operation, for messages.
        backend: "auto" is the kernel where it can run on a GPU and agrees with its twin there;
            "triton" and "reference" mean it.
        tensor: One of the call's tensors; its device decides.
        problem: Why this call's dtypes or shapes keep the kernel from serving it, or None.

    Raises:
        ConfigError: Unknown backend, or a kernel asked for by name that cannot serve the call.
        EnvironmentError_: The kernel was asked for by name and Triton is not installed.
    """
    if backend not in BACKENDS:
        raise ConfigError(
            f"unknown backend of {op}", where="backend", value=backend,
            allowed=", ".join(BACKENDS), fix='use "auto"',
        )  # fmt: skip
    serves = backend == "triton"
    if backend == "auto":
        serves = problem is None and tensor.is_cuda and _kernel_problem(op, tensor.device) is None
    elif serves:
        machine = _machine_problem(tensor.device)
        problem = problem or machine
        if machine == _NO_TRITON:
            raise EnvironmentError_(
                f"the Triton kernel of {op} was asked for and Triton is not installed",
                where="backend", value=backend,
                fix='pip install triton, or use backend="auto"',
            )  # fmt: skip
        if problem is not None:
            raise ConfigError(
                f"the Triton kernel of {op} cannot serve this call", where="backend",
                value=problem, allowed=_ALLOWED, fix='use backend="auto"',
            )  # fmt: skip
    if not torch.compiler.is_compiling():
        _log_once(op, "triton" if serves else "reference")
    return serves


_NO_TRITON = "Triton is not installed"
_ALLOWED = "a CUDA device of compute capability 8.0 or later, and what the operation documents"


@torch.compiler.assume_constant_result
def _machine_problem(device: torch.device) -> str | None:
    """Why no kernel runs on ``device``, or None."""
    return _asked_once(device)


@torch.compiler.assume_constant_result
def _kernel_problem(op: str, device: torch.device) -> str | None:
    """Why "auto" does not pick the kernel of ``op`` on ``device``, or None."""
    return _asked_once(device) or _checked_once(op, device)


@cache
def _checked_once(op: str, device: torch.device) -> str | None:
    """How the kernel of ``op`` failed its small case on ``device``, or None."""
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            pairs = list(zip(*CHECKS[op](device), strict=True))
        errors = [float((got - twin).norm() / twin.norm()) for got, twin in pairs]
        problem = None if max(errors) <= TOLERANCE else f"off by {max(errors):.1e} (relative)"
    except Exception as error:  # whatever a compiler or driver raises, the plain form still works
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        logger.warning(
            "the Triton kernel of %s is not used on %s, its plain form is: %s", op, device, problem
        )
    return problem


@cache
def _asked_once(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return _NO_TRITON
    if device.type != "cuda":
        import triton

        # Triton's interpreter runs kernels in Python, anywhere: for tests and to find errors
        return None if triton.knobs.runtime.interpret else f"tensors on {device}"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else "compute capability {}.{}".format(*capability)


@cache
def _log_once(op: str, backend: str) -> None:
    logger.info("%s backend: %s", op, backend)
