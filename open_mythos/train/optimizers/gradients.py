"""Norm and scaling of sharded gradients; conditional optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from open_mythos.train.optimizers.muon import local


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the norm of all gradients, a scalar that is equal in all processes."""
    by_mesh: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        grad = parameter.grad
        if grad is not None:
            mesh = grad.device_mesh if isinstance(grad, DTensor) else None
            by_mesh.setdefault(mesh, []).append(grad)
    norms = [get_total_norm(grads) for grads in by_mesh.values()]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def scale_gradients(parameters: Sequence[nn.Parameter], factor: Tensor) -> None:
    """Multiply every gradient by the scalar ``factor``, each process its own shard."""
    parts = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if parts:
        torch._foreach_mul_(parts, factor.to(parts[0].device))


def step_if(optimizer: torch.optim.Optimizer, proceed: Tensor) -> None:
    """Call ``optimizer.step()`` without any effect if the boolean scalar ``proceed`` is False.

    The device decides, by the protocol of ``torch.amp.GradScaler``: the optimizer, a fused one of
    PyTorch or :class:`~open_mythos.train.optimizers.muon.Muon`, reads the attribute ``found_inf``.
    Weights and state stay equal bit for bit; missing state is created as zeros.
    """
    deciding: Any = optimizer
    deciding.found_inf = (~proceed).float()
    try:
        optimizer.step()
    finally:
        del deciding.found_inf
