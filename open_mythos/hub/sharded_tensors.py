"""Sharded tensors in safetensors files, each process writing its own shards.

The format is that of ``torch.distributed.checkpoint``: the files' headers hold the offsets, so any
number of processes can read them. Names start with the file that a single process would write:
"model/...".
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

from open_mythos.distributed import rank
from open_mythos.errors import DataError, EnvironmentError_, MythosError
from open_mythos.files import open_safetensors
from open_mythos.hub.places import SHARDS, is_sharded


def write_shards(
    folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None
) -> list[Path]:
    """Write ``tensors`` into ``folder``; a collective call.

    Args:
        folder: An existing folder, the same for all processes.
        tensors: The same names in all processes. DTensors are written shard by shard, other
            tensors by one process.
        group: For planning; all processes by default.

    Returns:
        The files that this process wrote.

    Raises:
        EnvironmentError_: A process could not write.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with warnings.catch_warnings(action="ignore"):  # of torch about its own calls
            save(dict(tensors), storage_writer=writer, process_group=group)
    except (CheckpointException, OSError) as error:
        raise EnvironmentError_(
            "the shards could not be written", where=str(folder), value=_reason(error),
            allowed="a folder that can be written",
            fix="check disk space and permissions; all processes must share the folder",
        ) from error  # fmt: skip
    return sorted(folder.glob(SHARDS.replace("*", f"{rank() + 1:05d}-*")))


def stored_shapes(folder: Path) -> dict[str, torch.Size]:
    """Return name -> shape of every tensor in ``folder``, sharded or not.

    Raises:
        DataError: A file cannot be read.
    """
    shapes: dict[str, torch.Size] = {}
    with _readable(folder):
        if is_sharded(folder):
            metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
            stored = cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)
            return {name: each.size for name, each in stored.items()}
        for path in folder.glob("*.safetensors"):
            with open_safetensors(path) as file:
                for name in file.keys():  # noqa: SIM118
                    shapes[f"{path.stem}/{name}"] = torch.Size(file.get_slice(name).get_shape())
    return shapes


def read_tensors(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Fill ``into`` in place, each process its own shards of DTensors; a collective call.

    Reads sharded and unsharded files, written by any number of processes. Nothing changes unless
    names and shapes match.

    Raises:
        DataError: A file cannot be read, a name is missing, or a shape differs.
    """
    shapes = stored_shapes(folder)
    for name, tensor in into.items():
        if shapes.get(name) != tensor.shape:
            stored = tuple(shapes[name]) if name in shapes else "missing"
            raise DataError(
                f"the stored {name} does not match", where=str(folder), value=stored,
                allowed=str(tuple(tensor.shape)), fix="use the configuration of the checkpoint",
            )  # fmt: skip
    if is_sharded(folder):
        with _readable(folder), warnings.catch_warnings(action="ignore"):
            load(
                {name: tensor.detach() for name, tensor in into.items()},
                storage_reader=HuggingFaceStorageReader(str(folder)),
                no_dist=not dist.is_initialized(),
            )
        return
    with _readable(folder), torch.no_grad():
        for name, tensor in into.items():
            stem, _, key = name.partition("/")
            with open_safetensors(folder / f"{stem}.safetensors") as file:
                copy_part(tensor, file.get_tensor(key))


def copy_part(target: Tensor, source: Tensor) -> None:
    """Copy a full tensor, or one sharded like ``target``, into ``target``."""
    if not isinstance(target, DTensor):
        target.copy_(source)
        return
    if not isinstance(source, DTensor):
        # every process has the full tensor: no communication
        source = distribute_tensor(
            source.to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )
    target.to_local().copy_(source.to_local())


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        for path in folder.glob(SHARDS):
            if not path.is_file():  # a pipe would be waited for
                raise OSError(f"{path.name} is not a regular file")
        yield
    except MythosError:
        raise
    except (CheckpointException, OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(
            "the shards cannot be read", where=str(folder), value=_reason(error),
            allowed="whole safetensors files", fix="copy the folder again",
        ) from error  # fmt: skip


def _reason(error: BaseException) -> str:
    failures = getattr(error, "failures", None) or {}
    first = next((failure for failure, _ in failures.values()), error)
    return (str(first).strip() or type(first).__name__).splitlines()[0]
