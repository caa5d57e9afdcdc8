"""Tensors of several processes in safetensors files, each process writing what it holds.

The files are those of ``torch.distributed.checkpoint``: every tensor in pieces, whose places are
named in the files' headers. So they can be read by any number of processes, and by one. A tensor's
name begins with that of the file it would be in if one process had written it: "model/...".
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
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
from open_mythos.errors import DataError, EnvironmentError_

PATTERN = "shard-*.safetensors"


def is_sharded(folder: str | Path) -> bool:
    """Whether the tensors in ``folder`` lie in pieces."""
    return any(Path(folder).glob(PATTERN))


def write_shards(
    folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None
) -> list[Path]:
    """Write ``tensors`` into ``folder``, all processes together.

    Args:
        folder: Exists, and is the same for all processes.
        tensors: The same names in all processes; a DTensor's local part is written, of other
            tensors one process's copy.
        group: For the agreement on who writes what; all processes by default.

    Returns:
        The files that this process wrote.

    Raises:
        EnvironmentError_: Some process could not write.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with _quiet():
            save(dict(tensors), storage_writer=writer, process_group=group)
    except (CheckpointException, OSError) as error:
        raise EnvironmentError_(
            "the shards could not be written", where=str(folder), value=_reason(error),
            fix="make room or mend the permissions; all processes must reach the same folder",
        ) from error  # fmt: skip
    return sorted(folder.glob(PATTERN.replace("*", f"{rank() + 1:05d}-*")))


def stored_shapes(folder: Path) -> dict[str, torch.Size]:
    """Name -> shape of every tensor in the safetensors files of ``folder``, in pieces or whole.

    Raises:
        DataError: A file cannot be read.
    """
    if not is_sharded(folder):
        with _readable(folder), ExitStack() as stack:
            return {
                f"{path.stem}/{name}": torch.Size(file.get_slice(name).get_shape())
                for path in sorted(folder.glob("*.safetensors"))
                for file in [stack.enter_context(safe_open(path, "pt"))]
                for name in file.keys()  # noqa: SIM118
            }
    with _readable(folder):
        metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    found: dict[str, torch.Size] = {}
    for name, stored in metadata.state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        found[name] = stored.size
    return found


def read_tensors(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Fill ``into`` with the tensors of these names, each process its own part of a DTensor.

    Reads whole tensors as well as pieces, whatever the number of processes that wrote them. In a
    process group it is called by all of them. Nothing is changed unless names and shapes fit.

    Raises:
        DataError: A file cannot be read, a name is missing, or a shape differs.
    """
    shapes = stored_shapes(folder)
    for name, tensor in into.items():
        if shapes.get(name) != tensor.shape:
            stored = tuple(shapes[name]) if name in shapes else "missing"
            raise DataError(
                f"the stored {name} does not fit", where=str(folder), value=stored,
                allowed=str(tuple(tensor.shape)), fix="build the model of the checkpoint",
            )  # fmt: skip
    if is_sharded(folder):
        with _readable(folder), _quiet():
            load(
                {name: tensor.detach() for name, tensor in into.items()},
                storage_reader=HuggingFaceStorageReader(str(folder)),
                no_dist=not dist.is_initialized(),
            )
        return
    with _readable(folder), torch.no_grad():
        for name, tensor in into.items():
            stem, _, key = name.partition("/")
            with safe_open(folder / f"{stem}.safetensors", "pt") as file:
                copy_part(tensor, file.get_tensor(key))


def copy_part(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor, or one that is sharded alike, into ``target``, whole or sharded."""
    if not isinstance(target, DTensor):
        target.copy_(source)
        return
    if not isinstance(source, DTensor):
        # every process has read the whole tensor, so none has to send anything
        source = distribute_tensor(
            source.to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )
    target.to_local().copy_(source.to_local())


def holds_parts(tensors: Mapping[str, Tensor]) -> bool:
    """Whether this process holds only parts of ``tensors``."""
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch warns itself of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (CheckpointException, OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(
            "the shards cannot be read", where=str(folder), value=_reason(error),
            allowed="whole safetensors files", fix="copy the folder again",
        ) from error  # fmt: skip


def _reason(error: BaseException) -> str:
    failures = getattr(error, "failures", None) or {}
    first = next((failure for failure, _ in failures.values()), error)
    return (str(first).strip() or type(first).__name__).splitlines()[0]
