"""Track the memory of a training step on fake tensors.

This module contains every use of private PyTorch APIs in this package:

- ``torch.distributed._tools.mem_tracker.MemTracker`` counts the bytes of live storages. PyTorch has
  no public memory estimator.
- ``torch._subclasses.fake_tensor`` runs the step without data.
- ``torch.testing._internal.distributed.fake_pg`` is a process group without peers.
- ``torch._library.custom_ops`` gives the Python body of a custom op, so that its allocations count.
  On fake tensors PyTorch would only infer the shapes of its results.
- :func:`dry_run` patches the parts of DDP, FSDP2 and DTensor that read values on the host or
  communicate during setup; :func:`_call` corrects ops that allocate differently on fake tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import DEFAULT, patch

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

ENGINE_REFERENCES, STORAGE_REFERENCES = 4, 2
"""Reference counts of a gradient and its storage while autograd, its only owner, accumulates."""


class Part(_RefType):
    """Purposes of memory, in display order."""

    WEIGHTS = "weights"
    OPTIMIZER = "optimizer state"
    AVERAGE = "averaged weights"
    GRADIENTS = "gradients"
    GATHERED = "gathered weights"
    COPIES = "half-precision weights"
    ACTIVATIONS = "activations"
    UPDATE = "optimizer's update"


class DryRun(FakeTensorMode):
    """Fake CPU tensors; :func:`open_mythos.devices.kernel_device` reads ``kernels``."""

    def __init__(self, kernels: str) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.kernels = kernels


class StepTracker(MemTracker):
    """Count live bytes by :class:`Part` and record the peak of each phase.

    Attributes:
        part: Purpose of new storages.
        phase: Current phase; None records no peaks.
        peaks: Phase -> bytes of each part at its peak.
        paused: Nesting depth of regions that are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part: Part = Part.WEIGHTS
        self.phase: str | None = None
        self.peaks: dict[str, dict[str, int]] = {}
        self._ref_class = Part
        self.paused = 0

    def __enter__(self) -> StepTracker:
        # unlike MemTracker's, without the module hooks for its per-module statistics
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
            return NotImplemented  # called again with the local tensors
        if self.paused or func.namespace == "prim":
            return func(*args, **(kwargs or {}))
        body = OPDEFS.get(func._schema.name)
        if body is not None and func.namespace == "open_mythos":
            with self:
                return body._init_fn(*args, **(kwargs or {}))
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # a fake op would return a new tensor
        found = _call(func, args, kwargs or {})
        part = self.part
        if func is torch.ops.aten._to_copy.default:
            info, _ = self._WINFO.get(args[0].untyped_storage(), (None, None))
            if info is not None and info.reftype in (Part.WEIGHTS, Part.GATHERED):
                part = Part.COPIES
        tree_map_only(Tensor, lambda each: self._track(part, each), found)
        self._mark_collective(func, args, kwargs or {})
        total = sum(snapshot["Total"] for snapshot in self._curr_mem_snap.values())
        if self.phase and total > sum(self.peaks.get(self.phase, {}).values()):
            self.peaks[self.phase] = self.live()
        return found

    def mark(self, tensor: Tensor, part: Part) -> None:
        """Assign the storage of ``tensor`` to ``part``."""
        self._update_and_maybe_create_winfos(tensor, part)

    def live(self) -> dict[str, int]:
        """Return the live bytes by part name."""
        return {
            part.value: n
            for snapshot in self._curr_mem_snap.values()
            for part, n in snapshot.items()
            if isinstance(part, Part)
        }

    def mark_gradients(self, call: nn.Module) -> None:
        """Assign the gradients of ``call``'s parameters to :attr:`Part.GRADIENTS`."""
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
            if isinstance(module, FSDPModule):  # has other parameters while gathered
                module.register_forward_pre_hook(hook)

    def _mark_collective(self, func: Any, args: Any, kwargs: Any) -> None:
        """Assign the communication buffers of FSDP2 to gathered weights and gradients."""
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
    """Run the block on tracked fake tensors as rank 0 of ``gpus`` processes.

    Raises:
        ConfigError: A process group is already initialized.
    """
    if dist.is_initialized():
        raise ConfigError(
            "planning needs a process without a process group", where="torch.distributed",
            value="an initialized process group", allowed="none",
            fix="plan before torch.distributed.init_process_group",
        )  # fmt: skip
    if gpus > 1:
        dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        with (
            patch.object(parallelize, "init_device_mesh", _real_mesh),
            patch.object(parallelize, "_sum_gradients", _skip_all_reduce),
            # no checks and broadcasts of parameters: mocks do nothing
            patch.multiple(
                ddp, _verify_param_shape_across_processes=DEFAULT, _sync_module_states=DEFAULT
            ),
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
    """Pause counting while DTensor infers shapes of full tensors, which are never allocated."""

    def __init__(self, tracker: StepTracker) -> None:
        self._tracker = tracker

    def __enter__(self) -> None:
        self._tracker.paused += 1

    def __exit__(self, *error: object) -> None:
        self._tracker.paused -= 1


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    """Call ``func``; correct ops that allocate differently on fake tensors."""
    if func is torch.ops.aten.add.Tensor and _accumulates(*args[:2]):
        return args[0].add_(args[1])
    if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
        halves = [each.to(torch.bfloat16) for each in args[:2]]
        return func(*halves, *args[2:], **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)


def _accumulates(total: Any, more: Any) -> bool:
    """Return whether autograd accumulates into a gradient that only it references.

    Autograd accumulates real tensors in place, but tensor subclasses out of place.
    """
    if not isinstance(more, Tensor) or total.shape != more.shape or total.dtype != more.dtype:
        return False
    frame = sys._getframe(3)  # caller of the tracker, or a PyTorch wrapper around it
    while frame.f_back is not None and frame.f_code.co_name in ("_fn", "inner"):
        frame = frame.f_back
    return (
        frame.f_code.co_name == "_engine_run_backward"
        and total._use_count() <= ENGINE_REFERENCES
        and torch._C._storage_Use_Count(total.untyped_storage()._cdata) <= STORAGE_REFERENCES
    )


def _real_mesh(*args: Any, **kwargs: Any) -> DeviceMesh:
    """Create the mesh outside of the fake mode: DeviceMesh reads the values of its rank tensor."""
    with unset_fake_temporarily():
        return init_device_mesh(*args, **kwargs)


def _first_chunk(tensor: Tensor, num_chunks: int, dim: int) -> list[Tensor]:
    """Return the shard of rank 0 only; views for thousands of ranks would take minutes."""
    return [tensor.narrow(dim, 0, -(-tensor.shape[dim] // num_chunks))]


def _skip_all_reduce(state: None, bucket: GradBucket) -> Future[Tensor]:
    """DDP communication hook: the fake process group's work objects have no future."""
    done: Future[Tensor] = Future()
    done.set_result(bucket.buffer())
    return done


_skip_all_reduce.__annotations__ = {"bucket": GradBucket, "return": Future[Tensor]}
