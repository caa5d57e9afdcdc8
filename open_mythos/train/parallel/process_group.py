"""The process group of a run, and reductions over its ranks.

Results do not depend on the world size: data, depths and randomness are functions of global sample
indices, losses are divided by counts of the whole step, gradients are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import reduce
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from open_mythos.checks import checked
from open_mythos.devices import resolve_device
from open_mythos.distributed import launched, local_rank, rank, world_size
from open_mythos.errors import EnvironmentError_, MythosError
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.layers.moe import MoEFFN
from open_mythos.model.trace import PER_ROW, LoopTrace
from open_mythos.train.config import ParallelConfig

T = TypeVar("T")


def device_of_process(name: str) -> torch.device:
    """Return the device of this rank; "auto" and "cuda" assign each rank its own GPU."""
    device = resolve_device(name)
    if device.type == "cuda" and device.index is None and launched():
        return torch.device("cuda", local_rank())
    return device


@checked
@contextmanager
def process_group(config: ParallelConfig, device: str) -> Iterator[None]:
    """Initialize the process group within ``with``; does nothing without a launcher or within one.

    Raises:
        EnvironmentError_: The processes cannot connect.
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
            "the processes of the run cannot connect", where="torch.distributed",
            value=str(error).splitlines()[0],
            allowed="as many processes as WORLD_SIZE says, that reach MASTER_ADDR:MASTER_PORT",
            fix="start them all with one torchrun command; see docs/training.md",
        ) from error  # fmt: skip
    try:
        yield
    finally:
        dist.destroy_process_group()


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum ``x`` over ranks in float64, in rank order, without a host-device sync."""
    everyone = [torch.empty_like(x, dtype=torch.float64) for _ in range(world_size())]
    dist.all_gather(everyone, x.double())
    return reduce(torch.add, everyone).to(x.dtype)


def sum_loads(trace: LoopTrace, loops: int, model: CausalLM) -> None:
    """Sum the expert loads in ``trace`` over ranks, in place; ``loops`` is the most of any rank."""
    mixtures = [module for module in model.modules() if isinstance(module, MoEFFN)]
    if world_size() == 1 or not mixtures:
        return
    keys = [(mixture.layer, loop) for mixture in mixtures for loop in range(loops)]
    none_E = torch.zeros_like(mixtures[0].router_bias)
    total = torch.stack([trace.load.get(key, none_E) for key in keys])
    dist.all_reduce(total)
    trace.load = dict(zip(keys, total.unbind(), strict=True))


def merge_over_ranks(trace: LoopTrace, depths: Tensor | None) -> tuple[LoopTrace, Tensor | None]:
    """Concatenate the rows of the traces, and the depths (B,), of all ranks."""
    if world_size() == 1:
        return trace, depths
    rows = {name: {t: x.cpu() for t, x in getattr(trace, name).items()} for name in PER_ROW}
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, (rows, depths))
    total = LoopTrace(load=trace.load)
    for of_rank, _ in everyone:
        total.add(LoopTrace(**of_rank))
    return total, None if depths is None else torch.cat([each for _, each in everyone])


def first_decides(decide: Callable[[], T]) -> T:
    """Return rank 0's ``decide()`` on all ranks, or raise its error on all ranks."""
    if world_size() == 1:
        return decide()
    results: list[Any] = [None]
    if rank() == 0:
        try:
            results = [decide()]
        except MythosError as error:
            results = [error]
    dist.broadcast_object_list(results, src=0)
    if isinstance(results[0], MythosError):
        raise results[0]
    return results[0]
