"""Expert parallelism: routed experts are divided among ranks and tokens are sent to them.

Uses the all-to-all of GShard (arXiv 2006.16668, section 3), with rows sorted by expert instead of
fixed capacities, so no token is dropped. It runs in every loop, so all ranks of a group run the
same number of loops, with an empty batch on ranks without active rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from open_mythos.devices import as_autocast, uncompiled
from open_mythos.model.layers.experts import Experts, Operands, RoutedExperts, Weights
from open_mythos.model.layers.moe import MoEFFN
from open_mythos.ops.experts.routed import routed_experts
from open_mythos.ops.experts.rows import expert_load, read_counts

STACKS = ("gate_up", "down")


def expert_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights of all routed experts."""
    for module in model.modules():
        if isinstance(module, MoEFFN):
            yield from (getattr(module, name) for name in STACKS)


def apply_expert_parallelism(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the expert weights of ``model`` as DTensors over the axis "expert" of ``mesh``."""
    for module in model.modules():
        if isinstance(module, MoEFFN):
            for name in STACKS:
                whole = getattr(module, name)
                # every rank has built the same model, so there is nothing to send
                local = distribute_tensor(
                    whole.detach(), mesh, [Replicate(), Shard(0)], src_data_rank=None
                )
                setattr(module, name, nn.Parameter(local, whole.requires_grad))
            assert isinstance(module.experts, RoutedExperts)
            module.experts = ExpertParallel(mesh, module.experts.backend)


class ExpertParallel(Experts):
    """Experts distributed over ranks, with an all-to-all of tokens to them and of results back.

    Args:
        mesh: (replica, expert) ranks.
        backend: Backend of :func:`~open_mythos.ops.experts.routed.routed_experts`.
    """

    def __init__(self, mesh: DeviceMesh, backend: str = "auto") -> None:
        super().__init__()
        self.backend, self._group, self._size = backend, mesh.get_group(1), mesh.size(1)

    def operands(self, weights: Weights, n_choices: int, memo: dict[Any, Any]) -> Operands:
        """Return the weights of this rank's experts."""
        return _local_weights(weights[0]), _local_weights(weights[1])

    @uncompiled  # a compiled block has one graph break here
    def forward(
        self, x_ND: Tensor, experts_NC: Tensor, weights_NC: Tensor, gate_up: Any, down: Any
    ) -> Tensor:
        """Sum over the chosen experts (N, C) of weight (N, C) times expert output, (N, D)."""
        (n_tokens, n_chosen), n_local = experts_NC.shape, len(gate_up)
        order = experts_NC.flatten().argsort(stable=True)
        sends = expert_load(experts_NC, n_local * self._size).long()
        arrives = torch.empty_like(sends)
        dist.all_to_all_single(arrives, sends, group=self._group)
        # the host needs the split sizes: one host-device sync per MoE layer and loop
        to_rank = read_counts(sends.view(self._size, -1).sum(1), n_tokens * n_chosen)
        from_rank = read_counts(arrives.view(self._size, -1).sum(1), n_tokens * n_chosen)
        # append a row of zeros, so that there is at least one and every weight gets a gradient
        rows = _AllToAll.apply(x_ND[order // n_chosen], to_rank, from_rank, self._group)
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        numbers = torch.arange(n_local, device=x_ND.device).repeat(self._size)
        own = numbers.repeat_interleave(arrives, output_size=sum(from_rank))
        numbers = torch.cat([own, numbers[:1]]).unsqueeze(1)
        ones = weights_NC.new_ones(len(rows), 1)
        y = routed_experts(rows, gate_up, down, numbers, ones, backend=self.backend)[:-1]
        back = _AllToAll.apply(y, from_rank, to_rank, self._group)
        inverse = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=order.device)
        )
        y_NCD = back[inverse].view(n_tokens, n_chosen, back.shape[-1])
        return (y_NCD * weights_NC.to(y_NCD.dtype).unsqueeze(-1)).sum(1)


class _AllToAll(torch.autograd.Function):
    """All-to-all of rows; the backward pass is the inverse all-to-all of the gradient."""

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


def _local_weights(weight: Tensor | None) -> Tensor:
    """Return this rank's experts; their gradient is a partial sum over the replicas."""
    assert isinstance(weight, DTensor)
    return as_autocast(weight.to_local(grad_placements=[Partial(), Shard(0)]))
