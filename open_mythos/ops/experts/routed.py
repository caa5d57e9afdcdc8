"""Routed experts: the weighted sum of each token's chosen experts.

Each expert is a SwiGLU, ``down(silu(gate x) * up x)``, with the gate and up projections stored side
by side as one matmul. In a loop, a :class:`LoopedStack` defers the weight gradients of the experts
to one matmul over the tokens of all loops.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from open_mythos.devices import is_abstract, is_transformed, kernel_device
from open_mythos.errors import ConfigError
from open_mythos.ops.backend import pick_backend
from open_mythos.ops.experts.grouped import one_token
from open_mythos.ops.experts.looped_stack import LoopedStack
from open_mythos.ops.experts.operation import KINDS, experts_op, forward, reference

BACKENDS = (*KINDS, "reference")
DEFERRED_TOKENS = 256
"""Most tokens per expert and use at which deferring gradients pays."""
BATCHED_TOKENS = 2
"""Fewest tokens per expert at which batched matmuls pay, on a CPU in bfloat16."""


def deferring_pays(
    n_choices: int, gate_up_EDF: Tensor, down_EFD: Tensor, backend: str = "auto"
) -> bool:
    """Return whether a loop should use :class:`LoopedStack` for ``n_choices`` rows."""
    return (
        n_choices <= DEFERRED_TOKENS * gate_up_EDF.shape[0]
        and torch.is_grad_enabled()
        and gate_up_EDF.requires_grad
        and down_EFD.requires_grad
        and backend != "reference"
        and not (is_transformed() or is_abstract(down_EFD))
        # on CUDA the deferred gradient needs a grouped matmul, whatever the forward pass uses
        and (
            kernel_device(gate_up_EDF) != "cuda" or _grouped_problem(gate_up_EDF, down_EFD) is None
        )
    )


def routed_experts(
    x_ND: Tensor,
    gate_up_EDF: Tensor | LoopedStack,
    down_EFD: Tensor | LoopedStack,
    experts_NC: Tensor,
    weights_NC: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Sum the outputs of each token's C chosen experts, times their weights.

    Args:
        x_ND: Tokens.
        gate_up_EDF: (E, D, 2F) gate and up projections.
        down_EFD: (E, F, D) down projections; both or neither may be a :class:`LoopedStack`.
        experts_NC: Chosen experts, int64, distinct within a token.
        weights_NC: Their weights.
        backend: "batched", "grouped", "sorted", "reference", or "auto": batched for many tokens on
            a CPU in bfloat16, else grouped where the shapes allow it, else sorted; or "tiles", for
            inference on a CPU: a token's bits do not depend on the other tokens.

    Returns:
        (N, D), in the dtype of the projections.

    Raises:
        ConfigError: Unknown backend, or one that cannot serve these shapes.
    """
    stacks = gate_up_EDF, down_EFD
    gate_up, down = (each.weight if isinstance(each, LoopedStack) else each for each in stacks)
    tokens = [each.token if isinstance(each, LoopedStack) else None for each in stacks]
    backend = _resolve(backend, experts_NC.numel(), gate_up, down)
    x_ND, weights_NC = x_ND.to(gate_up.dtype), weights_NC.to(gate_up.dtype)
    if backend == "reference" or is_transformed():
        return reference(x_ND, gate_up, down, experts_NC, weights_NC)
    keep = torch.is_grad_enabled() and any(
        each is not None and each.requires_grad
        for each in (x_ND, weights_NC, gate_up, down, *tokens)
    )
    if keep and backend == "tiles":
        raise ConfigError(
            "experts in tiles have no gradient", where="Context.exact", value=True,
            allowed="inference", fix="call the model in torch.no_grad()",
        )  # fmt: skip
    operands = x_ND, gate_up, down, weights_NC, experts_NC
    compiling = torch.compiler.is_compiling() or is_abstract(x_ND)
    alone = len(x_ND) == 1 and backend != "tiles"
    if alone and x_ND.device.type == "cpu" and not (keep or compiling):
        # decoding: takes two thirds of the time of sorting and grouping
        return one_token(*operands)
    run: Callable[..., tuple[Tensor, ...]] = experts_op if keep or compiling else forward
    return run(*operands, *tokens, backend, keep)[0]


def _resolve(backend: str, n_choices: int, gate_up_EDF: Tensor, down_EFD: Tensor) -> str:
    """Resolve "auto" and check that the backend can serve these weights."""
    problem = _grouped_problem(gate_up_EDF, down_EFD)
    if backend == "auto":
        backend = "grouped" if problem is None else "sorted"
        if (
            gate_up_EDF.dtype == torch.bfloat16
            and kernel_device(gate_up_EDF) == "cpu"
            and n_choices >= BATCHED_TOKENS * gate_up_EDF.shape[0]
        ):
            backend = "batched"
    if backend == "grouped" and problem is not None:
        raise ConfigError(
            "grouped matmuls cannot serve these experts", where="moe_backend", value=problem,
            allowed="rows of dim and of expert_dim in multiples of 16 bytes, at most 32-bit floats",
            fix='set moe_backend to "auto"',
        )  # fmt: skip
    if backend == "batched" and (
        gate_up_EDF.device.type != "cpu" or gate_up_EDF.dtype == torch.float16
    ):
        # padding repeats a row, and another expert may overflow float16 on it
        raise ConfigError(
            "batched matmuls cannot serve these experts", where="moe_backend",
            value=f"{gate_up_EDF.dtype} weights on {gate_up_EDF.device.type}",
            allowed="weights on a CPU, of any dtype but float16", fix='set moe_backend to "auto"',
        )  # fmt: skip
    if backend == "tiles" and kernel_device(gate_up_EDF) != "cpu":
        raise ConfigError(
            "experts in tiles need a CPU", where="Context.exact",
            value=f"weights on {gate_up_EDF.device.type}", allowed="weights on a CPU",
            fix="call the model without exact",
        )  # fmt: skip
    return pick_backend("expert", backend, {name: name for name in BACKENDS}, where="moe_backend")


def _grouped_problem(gate_up_EDF: Tensor, down_EFD: Tensor) -> str | None:
    """Return why the grouped kernel cannot take these weights, or None."""
    if gate_up_EDF.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{gate_up_EDF.dtype} weights"
    for width in (gate_up_EDF.shape[1], gate_up_EDF.shape[2], down_EFD.shape[1]):
        if width * gate_up_EDF.element_size() % 16:
            return f"a row of {width} {gate_up_EDF.dtype} elements"
    return None
