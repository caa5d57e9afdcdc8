"""Expert parallelism: each process holds some of the routed experts, and tokens travel to them.

The all-to-all of GShard (arXiv 2006.16668, section 3), with rows sorted by expert instead of fixed
capacities, so that no token is dropped. Inside a loop it happens at every loop: all processes of a
group run the same number of loops, those that have no rows left with none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from open_mythos.devices import as_autocast
from open_mythos.model.context import Context
from open_mythos.model.layers.moe import MoEFFN
from open_mythos.ops.experts.routed import expert_load, routed_experts

STACKS = ("gate_up", "down")


def expert_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The weights of all routed experts."""
    for module in model.modules():
        if isinstance(module, MoEFFN):
            yield from (getattr(module, name) for name in STACKS)


def apply_expert_parallelism(model: nn.Module, mesh: DeviceMesh) -> None:
    """Divide the experts of every mixture over the second axis of ``mesh``.

    Args:
        model: Its expert weights become DTensors; :meth:`MoEFFN.mix` is replaced.
        mesh: (replica, expert) processes; the experts divide by the second.
    """
    for module in model.modules():
        if isinstance(module, MoEFFN):
            for name in STACKS:
                whole = getattr(module, name)
                # every process has built the same model: there is nothing to send
                local = distribute_tensor(
                    whole.detach(), mesh, [Replicate(), Shard(0)], src_data_rank=None
                )
                setattr(module, name, nn.Parameter(local, whole.requires_grad))
            cast(Any, module).mix = _Mix(module, mesh)


class _Mix:
    """What replaces :meth:`MoEFFN.mix`."""

    def __init__(self, module: MoEFFN, mesh: DeviceMesh) -> None:
        self._module, self._group = module, mesh.get_group(1)
        self._size = mesh.size(1)
        self._local = module.gate_up.shape[0] // self._size

    def __call__(
        self, x_ND: Tensor, experts_NC: Tensor, weights_NC: Tensor, ctx: Context | None
    ) -> Tensor:
        n_tokens, n_chosen = experts_NC.shape
        gate_up, down = (_local_weights(getattr(self._module, name)) for name in STACKS)
        order = experts_NC.flatten().argsort(stable=True)
        sends = expert_load(experts_NC, self._local * self._size).long()
        arrives = torch.empty_like(sends)
        dist.all_to_all_single(arrives, sends, group=self._group)
        # the sizes of what travels must be known to the host: one wait per mixture
        to_rank = sends.view(self._size, -1).sum(1).tolist()
        from_rank = arrives.view(self._size, -1).sum(1).tolist()
        # one row more than arrives, so that there always is one and every weight has a gradient
        rows = _Travel.apply(x_ND[order // n_chosen], to_rank, from_rank, self._group)
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        numbers = torch.arange(self._local, device=x_ND.device).repeat(self._size)
        numbers = torch.cat([numbers.repeat_interleave(arrives), numbers[:1]]).unsqueeze(1)
        ones = weights_NC.new_ones(len(rows), 1)
        made = routed_experts(
            rows, gate_up, down, numbers, ones, backend=self._module.backend
        )[:-1]  # fmt: skip
        back = _Travel.apply(made, from_rank, to_rank, self._group)
        inverse = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=order.device)
        )
        y_NCD = back[inverse].view(n_tokens, n_chosen, back.shape[-1])
        return (y_NCD * weights_NC.to(y_NCD.dtype).unsqueeze(-1)).sum(1)


class _Travel(torch.autograd.Function):
    """All-to-all of rows; the gradient takes the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, to: list[int], from_: list[int], group: Any) -> Tensor:
        ctx.way = from_, to, group
        return _exchange(rows, to, from_, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, *ctx.way), None, None, None


def _exchange(rows: Tensor, to: list[int], from_: list[int], group: Any) -> Tensor:
    out = rows.new_empty(sum(from_), rows.shape[1])
    dist.all_to_all_single(out, rows.contiguous(), from_, to, group=group)
    return out


def _local_weights(weight: Tensor) -> Tensor:
    """This process's experts; their gradient is a part of the sum over the groups."""
    assert isinstance(weight, DTensor)
    return as_autocast(weight.to_local(grad_placements=[Partial(), Shard(0)]))
