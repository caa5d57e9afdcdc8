"""Muon: orthogonalised momentum, for the weight matrices inside the blocks.

Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024,
https://kellerjordan.github.io/posts/muon/), with the weight decay and the update size of Moonlight
(arXiv 2502.16982, section 2.2): the update of an A x B matrix is scaled by 0.2 sqrt(max(A, B)),
which gives its elements the root mean square 0.2 of a typical AdamW update. Learning rate and
weight decay then mean the same to both; docs/optimizers.md measures which rate is best for each.

``torch.optim.Muon`` takes nothing but whole 2-D parameters. The one here equals it on each matrix,
and also takes stacks of experts, matrices stored side by side, and sharded parameters.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from open_mythos.errors import ConfigError

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the polynomial a x + b x^3 + c x^5 that an iteration applies to every singular value. They
make small ones grow fastest, at the price of ending between about 0.7 and 1.2 instead of at 1."""
EPS = 1e-7
"""Least norm by which a matrix is divided."""
MATCH_RMS = 0.2
"""Root mean square of an AdamW update in units of the learning rate (arXiv 2502.16982)."""
_WIDEST = {"mps": torch.float32}
"""Precision in which scalars are computed, as Python would; float64 on all other devices."""


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """U V^T, nearly, of each matrix U S V^T, by Newton-Schulz iterations.

    In bfloat16 on every device, as ``torch.optim.Muon`` does: what is lost in rounding is far less
    than what the polynomial leaves undone.

    Args:
        x: (..., A, B) matrices.
        steps: Iterations.

    Returns:
        (..., A, B) bfloat16; zero where a matrix is zero.
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
    """Muon for matrices, alone or in stacks, whole or sharded.

    A parameter is the weight of a linear layer, (out, in), or a stack of them for the experts,
    (E, in, out); the matrix of each expert is orthogonalised on its own. A group's ``side_by_side``
    says how many maps of equal size share a matrix along its outputs (gate and up, keys and
    values): each of these is orthogonalised on its own too, for they are separate maps that are
    stored together for speed, and one would otherwise take from the other's share of the update.

    An expert that no token chose has a gradient of exact zeros. It is left as it is, momentum
    included, like a parameter of ``torch.optim.Muon`` whose gradient is None: its update would be
    as large as any, in the direction of ever older gradients.

    Parameters that FSDP2 has sharded (DTensors) keep weights and momentum sharded. Only the
    direction of the update is gathered, in bfloat16, one parameter at a time, and every process
    orthogonalises it; experts that lie whole in one process are orthogonalised there, and nothing
    is gathered.

    Args:
        params: Named or unnamed parameters, or groups of them.
        lr: Learning rate, as one would give to AdamW.
        weight_decay: Decoupled weight decay.
        momentum: Decay of the mean of gradients, in [0, 1).
        nesterov: Look ahead by one step of the momentum.
        ns_steps: Newton-Schulz iterations.
        side_by_side: Maps of equal size that share a matrix.

    Raises:
        ConfigError: A parameter is no matrix and no stack of them, or its outputs cannot be divided
            among ``side_by_side`` maps.
    """

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
        """Update every parameter that has a gradient; return what ``closure`` does.

        Where the attribute ``found_inf`` of ``torch.amp.GradScaler`` is set and 1, nothing changes
        (but the gradients, which become zero).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
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
        buffer: Tensor = state["momentum_buffer"]
        weight, mean = local(parameter), local(buffer)
        used: float | Tensor = 1.0
        if found_inf is not None:
            local(grad).masked_fill_(found_inf > 0, 0.0)  # NaN times zero would be NaN
            used = (1 - found_inf).to(_WIDEST.get(found_inf.device.type, torch.float64))
        if grad.dim() == 3:
            used = _used(grad)
        share = (1 - momentum) * used
        mean.lerp_(local(grad), share.to(mean.dtype) if isinstance(share, Tensor) else share)
        ahead = local(grad).lerp(mean, momentum) if group["nesterov"] else mean
        direction = _direction(ahead, parameter, group)
        weight.mul_(1 - lr * group["weight_decay"] * used)
        size = MATCH_RMS * math.sqrt(max(_matrix_shape(parameter, group["side_by_side"])))
        weight.add_(direction * used, alpha=-lr * size)


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer, each with groups of its own.

    Groups that are added later are AdamW's.

    Args:
        muon: With its groups.
        adamw: With its groups, which hold other parameters.
    """

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW) -> None:
        self._muon, self._adamw = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in a further group of parameters."""
        if "ns_steps" not in param_group:
            param_group = self._adamw.defaults | param_group
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what ``closure`` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
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


def local(tensor: Any) -> Tensor:
    """The part of a DTensor that this process holds, sharing its memory; other tensors as is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def is_sharded(tensor: Any) -> bool:
    """Whether this is a DTensor; whoever made it has imported what that takes seconds to import."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def _direction(ahead: Tensor, parameter: Any, group: dict[str, Any]) -> Tensor:
    """``ahead``, the part of an update that this process holds, orthogonalised with all parts."""
    maps = group["side_by_side"], group["ns_steps"]
    if not is_sharded(parameter):
        return _orthogonal_maps(ahead, *maps)
    whole = _whole(_part_of(parameter, ahead.bfloat16(), parameter.placements))
    direction = _part_of(parameter, _orthogonal_maps(whole.to_local(), *maps), whole.placements)
    return direction.redistribute(placements=parameter.placements).to_local()


def _part_of(parameter: Any, part: Tensor, placements: Any) -> Any:
    """A DTensor of the size of ``parameter`` of which this process holds ``part``."""
    return type(parameter).from_local(
        part, parameter.device_mesh, placements, shape=parameter.shape, stride=parameter.stride()
    )


def _whole(tensor: Any) -> Any:
    """A DTensor of which every process holds whole matrices; experts stay divided."""
    from torch.distributed.tensor import Replicate

    stack = tensor.dim() == 3
    kept = [p if stack and p.is_shard(0) else Replicate() for p in tensor.placements]
    return tensor.redistribute(placements=kept)


def _used(grad: Any) -> Tensor:
    """(E, 1, 1), of the experts that this process holds: 1 where there is a gradient, else 0."""
    largest = grad.abs().amax(dim=(1, 2), keepdim=True)
    if is_sharded(grad):
        largest = _whole(largest).to_local()
    return (largest != 0).to(largest.dtype)


def _orthogonal_maps(x: Tensor, n: int, steps: int) -> Tensor:
    """Orthogonalise each map of a matrix (n out, in), or of a stack (E, in, n out) of them."""
    if x.dim() == 2:
        return orthogonalise(x.unflatten(0, (n, -1)), steps).flatten(0, 1)
    maps = x.unflatten(2, (n, -1)).movedim(2, 1)
    return orthogonalise(maps, steps).movedim(1, 2).flatten(2)


def _matrix_shape(parameter: Tensor, n: int) -> tuple[int, int]:
    """Both sides of each of the n maps in a parameter."""
    if parameter.dim() == 2:
        return parameter.shape[0] // n, parameter.shape[1]
    return parameter.shape[1], parameter.shape[2] // n


def _check(parameter: Tensor, n: int) -> None:
    outputs = parameter.shape[0 if parameter.dim() == 2 else -1] if parameter.dim() else 0
    if parameter.dim() not in (2, 3) or outputs % n:
        raise ConfigError(
            "Muon cannot divide this parameter into matrices", where="Muon(params)",
            value=tuple(parameter.shape),
            allowed=f"(out, in) or (E, in, out), with outputs for {n} maps of equal size",
            fix="give it to AdamW",
        )  # fmt: skip
