"""Muon: orthogonalized momentum for the weight matrices inside the blocks.

Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024,
https://kellerjordan.github.io/posts/muon/), with the weight decay and the update size of Moonlight
(arXiv 2502.16982, section 2.2): the update of an A x B matrix is scaled by 0.2 sqrt(max(A, B)), so
that its elements have the root mean square 0.2 of a typical AdamW update.

``torch.optim.Muon`` accepts whole 2-D parameters only. This one equals it on each matrix, and also
supports stacks of experts, several maps stored in one matrix, and sharded parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement
from torch.optim.optimizer import ParamsT

from open_mythos.checks import check_count, check_number, checked
from open_mythos.errors import ConfigError

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the polynomial a x + b x^3 + c x^5 that an iteration applies to every singular
value. Small values grow fastest; all end between about 0.7 and 1.2."""
EPS = 1e-7
"""Minimum norm by which a matrix is divided."""
MATCH_RMS = 0.2
"""Root mean square of an AdamW update in units of the learning rate (arXiv 2502.16982)."""


def orthogonalize(x: Tensor, steps: int = 5) -> Tensor:
    """Approximate U V^T of each matrix U S V^T in ``x`` by Newton-Schulz iterations, in bfloat16.

    Shapes (..., A, B); a matrix of zeros stays zero.
    """
    a, b, c = COEFFICIENTS
    shape, tall = x.shape, x.shape[-2] > x.shape[-1]
    x = x.bfloat16().flatten(0, -3) if x.dim() != 2 else x.bfloat16().unsqueeze(0)
    x = x.mT if tall else x  # the Gram matrix is that of the shorter side
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(shape)


class Muon(torch.optim.Optimizer):
    """Muon for matrices or stacks of matrices, whole or sharded.

    A parameter is the weight of a linear layer, (out, in), or a stack of them for the experts,
    (E, in, out). Each expert's matrix is orthogonalized separately, and so is each of the
    ``side_by_side`` maps that share a matrix, such as gate and up.

    An expert that no token chose has a gradient of exact zeros. Its weights and momentum are left
    unchanged, like a parameter of ``torch.optim.Muon`` whose gradient is None.

    Weights and momentum of parameters that FSDP2 has sharded (DTensors) stay sharded. Only the
    direction of the update is gathered, in bfloat16, one parameter at a time, and orthogonalized by
    every process; an expert that one process holds completely is not gathered.

    Args:
        params: Named or unnamed parameters, or groups of them.
        lr: Learning rate, on the scale of AdamW's.
        weight_decay: Decoupled weight decay.
        momentum: Decay of the moving average of gradients, in [0, 1).
        nesterov: Use Nesterov momentum.
        ns_steps: Newton-Schulz iterations.
        side_by_side: Number of maps of equal size that share a matrix along its outputs.

    Raises:
        ConfigError: A parameter is neither a matrix nor a stack of matrices, or its outputs cannot
            be divided among ``side_by_side`` maps.
    """

    @checked
    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        side_by_side: int = 1,
    ) -> None:
        check_number("lr", lr, ge=0)
        check_number("weight_decay", weight_decay, ge=0)
        check_number("momentum", momentum, ge=0, lt=1)
        check_count("ns_steps", ns_steps)
        check_count("side_by_side", side_by_side)
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
            "ns_steps": ns_steps, "side_by_side": side_by_side,
        }  # fmt: skip
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                _check(parameter, group["side_by_side"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return the result of ``closure``.

        If the attribute ``found_inf`` of ``torch.amp.GradScaler`` is 1, only gradients change: they
        become zero.
        """
        loss = _evaluate(closure)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, found_inf)
        return loss

    def _update(
        self, parameter: Tensor, grad: Tensor, group: dict[str, Any], found_inf: Tensor | None
    ) -> None:
        state, lr, momentum = self.state[parameter], group["lr"], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        weight, mean = local(parameter), local(state["momentum_buffer"])
        used: float | Tensor = 1.0
        if found_inf is not None:
            local(grad).masked_fill_(found_inf > 0, 0.0)  # NaN times zero would be NaN
            # float64 rounds like Python's numbers; MPS has no float64
            used = (1 - found_inf).to(torch.float32 if found_inf.is_mps else torch.float64)
        if grad.dim() == 3:
            used = _used(grad)
        share = (1 - momentum) * used
        mean.lerp_(local(grad), share.to(mean.dtype) if isinstance(share, Tensor) else share)
        ahead = local(grad).lerp(mean, momentum) if group["nesterov"] else mean
        direction = _direction(ahead, parameter, group)
        weight.mul_(1 - lr * group["weight_decay"] * used)
        outputs, inputs = _sides(parameter)
        size = MATCH_RMS * math.sqrt(max(outputs // group["side_by_side"], inputs))
        weight.add_(direction * used, alpha=-lr * size)


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer; groups that are added later belong to AdamW."""

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW) -> None:
        self._muon, self._adamw = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters."""
        if "ns_steps" not in param_group:
            param_group = self._adamw.defaults | param_group
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return the result of ``closure``."""
        loss = _evaluate(closure)
        # assigned at every step: loading a state replaces groups and state
        self._muon.state = self._adamw.state = self.state
        for each in (self._muon, self._adamw):
            deciding: Any = each
            deciding.found_inf = getattr(self, "found_inf", None)
        self._muon.param_groups = [group for group in self.param_groups if "ns_steps" in group]
        self._adamw.param_groups = [group for group in self.param_groups if "betas" in group]
        self._muon.step()
        self._adamw.step()
        return loss


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a DTensor, sharing its memory; other tensors unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _evaluate(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _direction(ahead: Tensor, parameter: Tensor, group: dict[str, Any]) -> Tensor:
    """Orthogonalize an update, of which ``ahead`` is this process's shard; return the shard."""
    maps = group["side_by_side"], group["ns_steps"]
    if not isinstance(parameter, DTensor):
        return _orthogonal_maps(ahead, *maps)
    whole = _whole(_shard_of(parameter, ahead.bfloat16(), parameter.placements))
    direction = _shard_of(parameter, _orthogonal_maps(whole.to_local(), *maps), whole.placements)
    return direction.redistribute(placements=parameter.placements).to_local()


def _shard_of(parameter: DTensor, shard: Tensor, placements: Sequence[Placement]) -> DTensor:
    """Return the DTensor of the size of ``parameter`` of which this process holds ``shard``."""
    return DTensor.from_local(
        shard, parameter.device_mesh, placements, shape=parameter.shape, stride=parameter.stride()
    )


def _whole(tensor: DTensor) -> DTensor:
    """Gather matrices, so that every process holds whole ones; stacks stay divided by expert."""
    stack = tensor.dim() == 3
    kept = [p if stack and p.is_shard(0) else Replicate() for p in tensor.placements]
    return tensor.redistribute(placements=kept)


def _used(grad: Tensor) -> Tensor:
    """Return (E, 1, 1) for this process's experts: 1 where there is a gradient, else 0."""
    largest = grad.abs().amax(dim=(1, 2), keepdim=True)
    if isinstance(largest, DTensor):
        largest = _whole(largest).to_local()
    return (largest != 0).to(largest.dtype)


def _orthogonal_maps(x: Tensor, n: int, steps: int) -> Tensor:
    """Orthogonalize each map of a matrix (n out, in), or of a stack (E, in, n out) of them."""
    if x.dim() == 2:
        return orthogonalize(x.unflatten(0, (n, -1)), steps).flatten(0, 1)
    maps = x.unflatten(2, (n, -1)).movedim(2, 1)
    return orthogonalize(maps, steps).movedim(1, 2).flatten(2)


def _sides(parameter: Tensor) -> tuple[int, int]:
    """Return outputs and inputs of a matrix (out, in) or a stack (E, in, out)."""
    *_, rows, columns = parameter.shape
    return (rows, columns) if parameter.dim() == 2 else (columns, rows)


def _check(parameter: Tensor, n: int) -> None:
    if parameter.dim() not in (2, 3) or _sides(parameter)[0] % n:
        raise ConfigError(
            "Muon cannot divide this parameter into matrices", where="Muon(params)",
            value=tuple(parameter.shape),
            allowed=f"(out, in) or (E, in, out), with outputs for {n} maps of equal size",
            fix="give it to AdamW",
        )  # fmt: skip
