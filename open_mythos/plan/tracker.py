"""PyTorch's memory tracker for a training step on fake tensors.

Everything in this package that uses private parts of PyTorch is in this module:

- ``torch.distributed._tools.mem_tracker.MemTracker`` counts the bytes of all live storages. It is
  PyTorch's own tool for the purpose, but not public API; a public memory estimator would replace
  :class:`StepTracker`.
- ``torch._subclasses.fake_tensor`` runs the step without data. It is documented for users of
  ``torch.compile`` and exported nowhere else.
- ``torch.testing._internal.distributed.fake_pg`` is the process group whose other members do not
  exist. ``torch.distributed`` has no public one.
- ``torch._library.custom_ops`` finds the Python body of a custom operation, so that what it
  allocates is counted. On fake tensors PyTorch would only ask for the shapes of its results.
- :func:`dry_run` replaces what reads values on the host or asks other processes when DDP, FSDP2
  and DTensor prepare a model; :func:`_call` corrects where fake tensors allocate otherwise than
  real ones. Each replacement says why.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker, _RefType
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.futures import Future
from torch.nn.parallel import distributed as ddp
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from open_mythos.errors import ConfigError
from open_mythos.train.parallel import parallelize

TOTAL = "Total"
ENGINE_REFERENCES, STORAGE_REFERENCES = 4, 2
"""References to a gradient and to its storage while autograd, the only owner, adds to it."""


class Part(_RefType):
    """What memory is for, in the order in which it is shown."""

    WEIGHTS = "weights"
    MOMENTS = "optimizer state"
    AVERAGE = "averaged weights"
    GRADIENTS = "gradients"
    GATHERED = "gathered weights"
    COPIES = "half-precision weights"
    ACTIVATIONS = "activations"
    UPDATE = "optimizer's update"


class DryRun(FakeTensorMode):
    """Fake tensors on the CPU whose operations take the code path of ``kernels``.

    Args:
        kernels: "cuda" or "cpu"; :func:`open_mythos.devices.kernel_device` reads it.
    """

    def __init__(self, kernels: str) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.kernels = kernels


class StepTracker(MemTracker):
    """Counts live bytes by :class:`Part`, and keeps the peak of every phase.

    Attributes:
        part: What new storages are for.
        phase: Under which name peaks are kept; None keeps none.
        peaks: Phase -> bytes of each part when their sum was largest.
        paused: Whether nothing is counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part: Part = Part.WEIGHTS
        self.phase: str | None = None
        self.peaks: dict[str, dict[str, int]] = {}
        self._ref_class = Part
        self.paused = 0

    def __enter__(self) -> StepTracker:
        # the hooks on modules that MemTracker would install here are for its statistics of modules
        if self._depth == 0:
            self._track_resize()
        TorchDispatchMode.__enter__(self)
        self._depth += 1
        return self

    def __exit__(self, *error: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._restore_resize()
        TorchDispatchMode.__exit__(self, *error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # it comes again with the local tensors
        if self.paused or func.namespace == "prim":
            return func(*args, **(kwargs or {}))
        body = OPDEFS.get(func._schema.name)
        if body is not None and func.namespace == "open_mythos":
            with self:
                return body._init_fn(*args, **(kwargs or {}))
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # on fake tensors it would return a new one
        found = _call(func, args, kwargs or {})
        part = Part.COPIES if self._copies_a_weight(func, args) else self.part
        tree_map_only(Tensor, partial(self._track, part), found)
        self._mark_collective(func, args, kwargs or {})
        self._keep_peak()
        return found

    def mark(self, tensor: Tensor, part: Part) -> None:
        """Count the storage of ``tensor`` under ``part``."""
        self._update_and_maybe_create_winfos(tensor, part)

    def live(self) -> dict[str, int]:
        """Bytes alive now, by the names of their parts."""
        return {
            part.value: n
            for snapshot in self._curr_mem_snap.values()
            for part, n in snapshot.items()
            if isinstance(part, Part)
        }

    def mark_gradients(self, call: nn.Module) -> None:
        """Count the gradients of ``call``'s parameters under :attr:`Part.GRADIENTS`."""
        hooked: set[int] = set()

        def keep(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self.mark(parameter.grad, Part.GRADIENTS)

        def hook(module: nn.Module, *_: Any) -> None:
            for parameter in module.parameters():
                if parameter.requires_grad and id(parameter) not in hooked:
                    hooked.add(id(parameter))
                    parameter.register_post_accumulate_grad_hook(keep)

        hook(call)
        for module in call.modules():
            if isinstance(module, FSDPModule):  # its parameters are others while they are gathered
                module.register_forward_pre_hook(hook)

    def _keep_peak(self) -> None:
        if self.phase is None:
            return
        total = sum(snapshot[TOTAL] for snapshot in self._curr_mem_snap.values())
        if total > sum(self.peaks.get(self.phase, {}).values()):
            self.peaks[self.phase] = self.live()

    def _part_of(self, tensor: Any) -> Part | None:
        if not isinstance(tensor, Tensor) or isinstance(tensor, DTensor):
            return None
        info, _ = self._WINFO.get(tensor.untyped_storage(), (None, None))
        return None if info is None else info.reftype

    def _copies_a_weight(self, func: Any, args: Any) -> bool:
        return func is torch.ops.aten._to_copy.default and self._part_of(args[0]) in (
            Part.WEIGHTS,
            Part.GATHERED,
        )

    def _mark_collective(self, func: Any, args: Any, kwargs: Any) -> None:
        """Tell the buffers of FSDP2 from activations."""
        name = func._schema.name
        if name == "c10d::_allgather_base_":
            self.mark(args[0], Part.GATHERED)
        elif name == "c10d::_reduce_scatter_base_":
            self.mark(args[0], Part.GRADIENTS)
            self.mark(args[1], Part.GRADIENTS)
        elif name == "fsdp::split_with_sizes_copy":
            tree_map_only(Tensor, lambda each: self.mark(each, Part.GATHERED), kwargs["out"])


@contextmanager
def dry_run(gpus: int, kernels: str) -> Iterator[StepTracker]:
    """Make tensors fake, count them, and be the first of ``gpus`` processes.

    Raises:
        ConfigError: This process belongs to a process group.
    """
    if dist.is_initialized():
        raise ConfigError(
            "a plan is made in a process of its own", where="torch.distributed",
            value="an initialized process group", allowed="none",
            fix="plan before torch.distributed.init_process_group",
        )  # fmt: skip
    if gpus > 1:
        dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        with (
            patch.object(parallelize, "init_device_mesh", _real_mesh),
            patch.object(parallelize, "_sum_gradients", _sum_nothing),
            patch.object(ddp, "_verify_param_shape_across_processes", _verify_nothing),
            patch.object(ddp, "_sync_module_states", _verify_nothing),
            patch.object(_fsdp_param, "_chunk_with_empty", _first_chunk),
            DryRun(kernels),
            StepTracker() as tracker,
            patch.object(ShardingPropagator, "_fake_mode_lock", _Pause(tracker)),
        ):
            yield tracker
    finally:
        if gpus > 1:
            dist.destroy_process_group()


class _Pause:
    """Where DTensor computes the shapes of whole tensors, which are nowhere; entered repeatedly."""

    def __init__(self, tracker: StepTracker) -> None:
        self._tracker = tracker

    def __enter__(self) -> None:
        self._tracker.paused += 1

    def __exit__(self, *error: object) -> None:
        self._tracker.paused -= 1


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    """Call ``func`` on fake tensors where PyTorch treats them otherwise than real ones."""
    if func is torch.ops.aten.add.Tensor and _accumulates(*args[:2]):
        return args[0].add_(args[1])
    if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
        halves = [each.to(torch.bfloat16) for each in args[:2]]
        return func(*halves, *args[2:], **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)


def _accumulates(total: Any, more: Any) -> bool:
    """Return whether autograd adds a gradient to one that nobody else refers to.

    It adds real tensors in place, and subclasses such as fake tensors out of place.
    """
    if not isinstance(more, Tensor) or total.shape != more.shape or total.dtype != more.dtype:
        return False
    frame = sys._getframe(3)  # of what called the tracker, or of PyTorch's wrappers around it
    while frame.f_back is not None and frame.f_code.co_name in ("_fn", "inner"):
        frame = frame.f_back
    return (
        frame.f_code.co_name == "_engine_run_backward"
        and total._use_count() <= ENGINE_REFERENCES
        and torch._C._storage_Use_Count(total.untyped_storage()._cdata) <= STORAGE_REFERENCES
    )


def _real_mesh(*args: Any, **kwargs: Any) -> DeviceMesh:
    """Make a mesh outside of the fake mode: it reads the numbers of its processes."""
    with unset_fake_temporarily():
        return init_device_mesh(*args, **kwargs)


def _first_chunk(tensor: Tensor, num_chunks: int, dim: int) -> list[Tensor]:
    """The part of the first process; views for thousands of others would take minutes."""
    return [tensor.narrow(dim, 0, -(-tensor.shape[dim] // num_chunks))]


def _verify_nothing(*_: Any, **__: Any) -> None:
    """What DDP tells its other processes about the model when it is made."""


def _sum_nothing(state: None, bucket: GradBucket) -> Future[Tensor]:
    """The hook of DDP; work of the fake process group has no result to wait for."""
    done: Future[Tensor] = Future()
    done.set_result(bucket.buffer())
    return done


_sum_nothing.__annotations__ = {"bucket": GradBucket, "return": Future[Tensor]}
