"""The process group of a run: how it starts, and the values its processes exchange.

What a step computes does not depend on the number of processes. Data, depths and randomness follow
from global sample numbers, every loss is divided by counts of the whole step, gradients are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from open_mythos.devices import resolve_device
from open_mythos.distributed import launched, local_rank, rank, world_size
from open_mythos.errors import EnvironmentError_, MythosError
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.layers.moe import MoEFFN
from open_mythos.model.trace import PER_ROW, LoopTrace
from open_mythos.train.config import ParallelConfig

T = TypeVar("T")


def device_of_process(name: str) -> torch.device:
    """Return the device that ``name`` means; "auto" and "cuda" give each process its own GPU."""
    device = resolve_device(name)
    if device.type == "cuda" and device.index is None and launched():
        return torch.device("cuda", local_rank())
    return device


@contextmanager
def process_group(config: ParallelConfig, device: str) -> Iterator[None]:
    """Join the processes that a launcher started into one group, inside ``with``.

    Does nothing without a launcher, or when a process group exists already.

    Args:
        config: Its timeout ends the run when a process does not answer for so long.
        device: As in ``train.device``.

    Raises:
        EnvironmentError_: The processes do not find each other.
    """
    if not launched() or dist.is_initialized():
        yield
        return
    here = device_of_process(device)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo",
            timeout=timedelta(seconds=config.timeout),
        )
    except (RuntimeError, ValueError) as error:  # c10d raises several kinds of the first
        raise EnvironmentError_(
            "the processes of the run do not find each other", where="torch.distributed",
            value=str(error).splitlines()[0],
            allowed="as many processes as WORLD_SIZE says, that reach MASTER_ADDR:MASTER_PORT",
            fix="start them all with one torchrun command; see docs/training.md",
        ) from error  # fmt: skip
    try:
        yield
    finally:
        dist.destroy_process_group()


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum ``x`` over all processes in float64, in the order of their ranks; no host-device sync."""
    everyone = [torch.empty_like(x, dtype=torch.float64) for _ in range(world_size())]
    dist.all_gather(everyone, x.double())
    total = everyone[0]
    for each in everyone[1:]:
        total = total + each
    return total.to(x.dtype)


def sum_loads(trace: LoopTrace, loops: int, model: CausalLM) -> None:
    """Sum the expert loads in ``trace`` over all processes, in place.

    Args:
        trace: Of this process; it may have run fewer loops than others.
        loops: Most loops that any process ran in the step.
        model: Its mixtures of experts are summed.
    """
    mixtures = [module for module in model.modules() if isinstance(module, MoEFFN)]
    if world_size() == 1 or not mixtures:
        return
    keys = [(mixture.layer, loop) for mixture in mixtures for loop in range(loops)]
    none_E = torch.zeros_like(mixtures[0].router_bias)
    total = torch.stack([trace.load.get(key, none_E) for key in keys])
    dist.all_reduce(total)
    trace.load = dict(zip(keys, total.unbind(), strict=True))


def merge_over_ranks(trace: LoopTrace, depths: Tensor | None) -> tuple[LoopTrace, Tensor | None]:
    """Gather what all processes recorded in a step: the rows of all traces, all depths (B,)."""
    if world_size() == 1:
        return trace, depths
    rows = {name: _on_cpu(getattr(trace, name)) for name in PER_ROW}
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, (rows, depths))
    total = LoopTrace(load=trace.load)
    for of_rank, _ in everyone:
        total.add(LoopTrace(**of_rank))
    return total, None if depths is None else torch.cat([each for _, each in everyone])


def first_decides(decide: Callable[[], T]) -> T:
    """Return the first process's ``decide()`` in all of them; its error is raised everywhere."""
    if world_size() == 1:
        return decide()
    told: list[Any] = [None]
    if rank() == 0:
        try:
            told = [decide()]
        except MythosError as error:
            told = [error]
    dist.broadcast_object_list(told, src=0)
    if isinstance(told[0], MythosError):
        raise told[0]
    return told[0]


def _on_cpu(rows: dict[int, Tensor]) -> dict[int, Tensor]:
    return {loop: row.cpu() for loop, row in rows.items()}
