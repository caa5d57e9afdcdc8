"""Norm and scaling of gradients that may be spread over processes; steps that may not happen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the gradient norm over all parameters, a scalar that is the same in all processes."""
    by_mesh: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        grad = parameter.grad
        if grad is not None:
            mesh = grad.device_mesh if isinstance(grad, DTensor) else None
            by_mesh.setdefault(mesh, []).append(grad)
    norms = [_whole(get_total_norm(grads)) for grads in by_mesh.values()]
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def scale_gradients(parameters: Sequence[nn.Parameter], factor: Tensor) -> None:
    """Multiply every gradient by ``factor`` (a scalar), each process its own part."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    parts = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    if parts:
        torch._foreach_mul_(parts, factor.to(parts[0].device))


def step_if(optimizer: torch.optim.Optimizer, proceed: Tensor) -> None:
    """Call ``optimizer.step()``, without any effect where ``proceed`` (a boolean scalar) is False.

    The device decides, by the protocol of ``torch.amp.GradScaler``: the optimizer reads the
    attribute ``found_inf``. Fused optimizers of PyTorch do, and so does
    :class:`open_mythos.train.optimizers.muon.Muon`; weights and state stay equal bit for bit. State
    that does not exist yet is created, as zeros.
    """
    deciding: Any = optimizer
    deciding.found_inf = (~proceed).float()
    try:
        optimizer.step()
    finally:
        del deciding.found_inf


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
