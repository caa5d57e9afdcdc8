"""Apply parallelism to the single-device model code, from outside and in a fixed order.

Activation checkpointing comes first, then compilation, then expert parallelism, then replication
(DDP) or sharding (FSDP2) of all other parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from open_mythos.checks import checked
from open_mythos.distributed import world_size
from open_mythos.errors import ConfigError
from open_mythos.model.dense import DenseTransformer
from open_mythos.model.layers.block import TransformerBlock
from open_mythos.model.mythos import OpenMythos
from open_mythos.train.build import Model
from open_mythos.train.config import ParallelConfig, RunConfig
from open_mythos.train.parallel.compile import compile_block
from open_mythos.train.parallel.expert_parallel import apply_expert_parallelism, expert_parameters


@checked
def parallelize(model: Model, config: RunConfig) -> ParallelModel:
    """Prepare ``model`` for the ranks of the process group.

    With "fsdp" each prelude and coda block is a unit, and so is the module that owns the loop: its
    weights are gathered once for all loops and stay until its backward pass. The remainder
    (embedding, norms, read-out, head) is the outermost unit.

    ``model`` is changed in place; sharded parameters become DTensors.

    Raises:
        ConfigError: The world size does not fit the configuration.
    """
    parallel = config.parallel
    kind = _resolve_kind(parallel)
    if config.train.checkpoint_loops and isinstance(model, OpenMythos):
        model.recurrent.checkpoint = True
    if config.train.compile:
        looped = set(model.recurrent.blocks) if isinstance(model, OpenMythos) else set()
        for block in transformer_blocks(model):
            compile_block(block, rows_leave=block in looped)
    call: nn.Module = _Call(model)
    if kind == "ddp":
        call = DistributedDataParallel(call, gradient_as_bucket_view=True)
        call.register_comm_hook(None, _sum_gradients)
    elif kind == "fsdp":
        device = next(model.parameters()).device.type
        if parallel.experts > 1:
            apply_expert_parallelism(model, _mesh(device, parallel.experts, "expert"))
        elsewhere = set(expert_parameters(model)) if parallel.experts > 1 else None
        mesh = _mesh(device, parallel.shard or world_size(), "shard")
        for unit, reshard in sharding_units(model):
            fully_shard(unit, mesh=mesh, reshard_after_forward=reshard, ignored_params=elsewhere)
        fully_shard(call, mesh=mesh, reshard_after_forward=False, ignored_params=elsewhere)
        for module in call.modules():
            if isinstance(module, FSDPModule):
                # the loss is divided by counts of the whole step, so gradients are summed
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)
    return ParallelModel(call, model, keep_step=kind == "fsdp" and parallel.experts > 1)


class _Call(nn.Module):
    """Module that calls a function on the model: DDP and FSDP2 hook into module calls."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(self.model, *args, **kwargs)


class ParallelModel:
    """A model shared by all ranks of a run; created by :func:`parallelize`.

    Attributes:
        outermost: Module that calls functions on the model; wrapped by DDP or FSDP2.
        model: The model inside it.
        keep_step: Whether all ranks must run the same number of loops.
    """

    def __init__(self, call: nn.Module, model: Model, keep_step: bool) -> None:
        self.outermost, self.model, self.keep_step = call, model, keep_step

    def train_on(self, function: Callable[..., Any], *, last: bool, **arguments: Any) -> Any:
        """Return ``function(model, **arguments)`` with gradients, for one micro-batch.

        DDP all-reduces gradients in the ``last`` micro-batch of a step, FSDP2 in every one, since
        unsharded gradients would need the memory that sharding saves.
        """
        if isinstance(self.outermost, DistributedDataParallel):
            self.outermost.require_backward_grad_sync = last
        return self.outermost(function, **arguments)

    def look_at(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(model, *args)`` without gradients, with the loop's weights gathered."""

        def call(model: Model) -> Any:
            # functions may call the loop's step, which does not trigger the gathering
            loop: Any = model.recurrent if isinstance(model, OpenMythos) else None
            if not isinstance(loop, FSDPModule):
                return function(model, *args)
            loop.unshard()
            try:
                return function(model, *args)
            finally:
                loop.reshard()

        with torch.no_grad():
            return self.outermost(call)

    def finish_gradients(self) -> None:
        """Sum the gradients of experts over replicas; DDP and FSDP2 sum all others."""
        for parameter in expert_parameters(self.model):
            if isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor):
                parameter.grad = parameter.grad.redistribute(
                    parameter.device_mesh, parameter.placements
                )


def _resolve_kind(config: ParallelConfig) -> str:
    """Return "none", "ddp" or "fsdp" for the current world size."""
    size = world_size()
    kind = ("none" if size == 1 else "ddp") if config.kind == "auto" else config.kind
    if kind == "none" and size > 1:
        raise ConfigError(
            "several processes need a kind of parallelism", where="parallel.kind", value=kind,
            allowed='"ddp", "fsdp" or "auto"',
        )  # fmt: skip
    for name in ("shard", "experts"):
        part = getattr(config, name) or size
        if size % part:
            raise ConfigError(
                "the world size is not a multiple of it", where=f"parallel.{name}", value=part,
                allowed=f"a divisor of the number of processes ({size})",
            )  # fmt: skip
    return kind if size > 1 else "none"


def transformer_blocks(model: Model) -> list[TransformerBlock]:
    """Return all blocks in execution order."""
    if isinstance(model, DenseTransformer):
        found = [*model.blocks]
    else:
        found = [*model.prelude, *model.recurrent.blocks, *model.coda]
    return [cast(TransformerBlock, block) for block in found]


def sharding_units(model: Model) -> Iterable[tuple[nn.Module, bool]]:
    """Return the FSDP2 units and whether each is resharded after its forward pass.

    The loop stays gathered, because only the coda and the head run before its backward pass.
    """
    if isinstance(model, DenseTransformer):
        return [(block, True) for block in model.blocks]
    outer = [(block, True) for block in (*model.prelude, *model.coda)]
    return [*outer, (model.recurrent, False)]


def _mesh(device: str, inner: int, name: str) -> DeviceMesh:
    """Return the mesh of all ranks; its last axis has ``inner`` neighboring ranks."""
    # a model of shapes only (plan) uses a fake process group on the CPU
    device = "cpu" if device == "meta" else device
    outer = world_size() // inner
    if outer == 1 and name == "shard":
        return init_device_mesh(device, (inner,), mesh_dim_names=(name,))
    return init_device_mesh(device, (outer, inner), mesh_dim_names=("replica", name))


def _sum_gradients(state: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DDP communication hook: all-reduce without dividing by the world size."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


# DDP compares annotations by identity, but they are strings in this module
_sum_gradients.__annotations__ = {"bucket": GradBucket, "return": torch.futures.Future[Tensor]}
