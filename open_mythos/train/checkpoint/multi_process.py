"""Checkpoints of several processes: one folder, complete or not there at all, for all of them.

A replicated model is written by the first process. A sharded one is written by all, each its own
parts (:mod:`open_mythos.hub.sharded_tensors`); the manifest covers the files of all. Whatever goes
wrong in one process is raised in every one, so that they try again, or stop, together.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from open_mythos.distributed import rank, world_size
from open_mythos.errors import EnvironmentError_, MythosError
from open_mythos.files import sync_to_disk
from open_mythos.hub.sharded_tensors import holds_parts, write_shards
from open_mythos.train.checkpoint.manifest import Entry, entry_of_file
from open_mythos.train.checkpoint.snapshot import (
    Snapshot,
    begin_folder,
    fill_folder,
    publish,
    remove_old,
    unfinished,
    write_snapshot,
)

T = TypeVar("T")


def write_jointly(
    directory: Path, snapshot: Snapshot, keep: int, group: dist.ProcessGroup | None
) -> Path:
    """:func:`write_snapshot` for all processes of ``group``, which call it together.

    Args:
        directory: The same folder for all.
        snapshot: Of this process: whole tensors, the same in all, or DTensors.
        keep: Checkpoints that stay.
        group: None for a run of one process.

    Raises:
        EnvironmentError_: Some process could not write, or reads back something else; older
            checkpoints are untouched.
    """
    if group is None:
        return write_snapshot(directory, snapshot, keep)
    if any(holds_parts(tensors) for tensors in snapshot.tensors.values()):
        return _write_parts(directory, snapshot, keep, group)
    agreed(group, lambda: write_snapshot(directory, snapshot, keep) if rank() == 0 else None)
    return directory / snapshot.name


def agreed(group: dist.ProcessGroup | None, action: Callable[[], T]) -> T:
    """``action()``, whose error in one process is raised in all.

    Raises:
        MythosError: That of the first process that had one.
    """
    if group is None:
        return action()
    error: MythosError | None = None
    result: Any = None
    try:
        result = action()
    except MythosError as mine:
        error = mine
    except (OSError, SafetensorError) as mine:
        error = EnvironmentError_(
            "the checkpoint could not be written", where=f"process {rank()}", value=str(mine),
            fix="make room or mend the permissions, then resume; older checkpoints are untouched",
        )  # fmt: skip
    errors: list[MythosError | None] = [None] * world_size()
    dist.all_gather_object(errors, error, group)
    first = next((each for each in errors if each is not None), None)
    if first is not None:
        raise first
    return result


def parts(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of several files as one set: "model/name", "optimizer/name/moment", ..."""
    return {
        f"{Path(file).stem}/{name}": tensor
        for file, of_file in tensors.items()
        for name, tensor in of_file.items()
    }


def _write_parts(directory: Path, snapshot: Snapshot, keep: int, group: dist.ProcessGroup) -> Path:
    final = directory / snapshot.name
    first = rank() == 0
    partial = unfinished(directory, snapshot.name)
    try:
        agreed(group, lambda: begin_folder(partial) if first else None)
        files = write_shards(partial, parts(snapshot.tensors), group)
        mine = agreed(group, lambda: _entries(files))
        everyone: list[dict[str, Entry]] = [{} for _ in range(world_size())]
        dist.all_gather_object(everyone, mine, group)
        entries = {name: entry for each in everyone for name, entry in each.items()}

        def finish() -> None:
            fill_folder(partial, replace(snapshot, tensors={}), entries)
            publish(partial, final)

        agreed(group, lambda: finish() if first else None)
    finally:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
    if first:
        remove_old(final, keep)
    return final


def _entries(files: list[Path]) -> dict[str, Entry]:
    """The manifest's lines for files that this process has written."""
    with ThreadPoolExecutor() as pool:
        for path in files:
            sync_to_disk(path)
        return {path.name: entry_of_file(path, pool) for path in files}
