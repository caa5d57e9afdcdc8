"""Write a checkpoint atomically: its folder is complete or absent, for one process or many.

The files are written to a temporary folder, fsynced, read back and renamed into place; then older
checkpoints are removed. Rank 0 writes a replicated model. A sharded one is written by all ranks,
each its own shards (:mod:`open_mythos.hub.sharded_tensors`), under one manifest. An error in one
process is raised in all, so that they retry or stop together.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from open_mythos.distributed import rank, world_size
from open_mythos.errors import DataError, EnvironmentError_, MythosError
from open_mythos.files import sync_to_disk
from open_mythos.hub.sharded_tensors import write_shards
from open_mythos.train.checkpoint.find import OLD, checkpoints, list_folder
from open_mythos.train.checkpoint.manifest import (
    MANIFEST_FILE,
    Entry,
    entry_of_file,
    entry_of_tensors,
    entry_of_text,
    manifest_text,
    verify_checkpoint,
)
from open_mythos.train.checkpoint.snapshot import Snapshot

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished-"
"""Prefix of everything that is partly written or partly removed."""

T = TypeVar("T")


def write_checkpoint(
    directory: Path, snapshot: Snapshot, keep: int, group: dist.ProcessGroup | None = None
) -> Path:
    """Write ``directory/step_<step>``, verify it, then remove all but the newest ``keep``.

    A collective call of ``group``. Each process passes whole tensors, equal in all, or DTensors.

    Raises:
        EnvironmentError_: In some process the disk is full, cannot be written, or returns other
            bytes than were written; older checkpoints are untouched.
    """
    final, partial = directory / snapshot.name, directory / f"{UNFINISHED}{snapshot.name}"
    first, entries = rank() == 0, dict[str, Entry]()
    files = snapshot.tensors.values()
    sharded = any(isinstance(each, DTensor) for tensors in files for each in tensors.values())

    def begin() -> None:
        if first:
            make_folder(directory)
            remove_unfinished(directory)
            partial.mkdir()

    def finish() -> None:
        if first:
            content = replace(snapshot, tensors={}) if sharded else snapshot
            fill_folder(partial, content, entries)
            _publish(partial, final)

    try:
        together(group, final, begin)
        if sharded:
            entries |= _write_parts(partial, final, snapshot, group)
        together(group, final, finish)
    finally:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
    if first:
        _remove_old(final, keep)
    return final


def together(group: dist.ProcessGroup | None, where: Path, action: Callable[[], T]) -> T:
    """Call ``action()`` in all processes; raise an error in one of them in all.

    Raises:
        MythosError: The error of the lowest rank that had one.
    """
    error: MythosError | None = None
    result: Any = None
    try:
        result = action()
    except MythosError as mine:
        error = mine
    except (OSError, SafetensorError) as mine:
        error = EnvironmentError_(
            "the checkpoint could not be written", where=str(where), value=str(mine),
            allowed="a folder with space that can be written",
            fix="free space or fix the permissions, then resume; older checkpoints are untouched",
        )  # fmt: skip
        error.__cause__ = mine if group is None else None
    errors = [error]
    if group is not None:
        errors = [None] * world_size()
        dist.all_gather_object(errors, error, group)
    for each in errors:
        if each is not None:
            raise each
    return result


def _write_parts(
    partial: Path, final: Path, snapshot: Snapshot, group: dist.ProcessGroup | None
) -> dict[str, Entry]:
    """Write the tensors of a sharded model; return the manifest entries of all ranks' files."""
    parts = {
        f"{Path(file).stem}/{name}": tensor
        for file, tensors in snapshot.tensors.items()
        for name, tensor in tensors.items()
    }
    files = write_shards(partial, parts, group)

    def sync_and_hash() -> dict[str, Entry]:
        for path in files:
            sync_to_disk(path)
        return {path.name: entry_of_file(path) for path in files}

    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, together(group, final, sync_and_hash), group)
    return {name: entry for each in everyone for name, entry in each.items()}


def fill_folder(folder: Path, snapshot: Snapshot, others: Mapping[str, Entry]) -> None:
    """Write all files into ``folder``, fsync them and read them back, overlapped.

    ``others`` are the manifest entries of files that exist already.
    """
    with ThreadPoolExecutor() as jobs, ThreadPoolExecutor() as pool:
        synced, entries = [], {}
        for name, tensors in snapshot.tensors.items():
            path = folder / name
            save_file(dict(tensors), path, metadata={"format": "pt"})
            # safetensors creates files with mode 0600, whatever the umask is
            path.chmod(folder.stat().st_mode & 0o666)
            synced.append(jobs.submit(sync_to_disk, path))
            entries[name] = jobs.submit(entry_of_tensors, path, tensors, pool)
        for name, text in snapshot.texts.items():
            (folder / name).write_text(text, encoding="utf-8")
            synced.append(jobs.submit(sync_to_disk, folder / name))
            entries[name] = jobs.submit(entry_of_text, folder / name, text, pool)
        text = manifest_text({name: each.result() for name, each in entries.items()} | dict(others))
        (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")
        sync_to_disk(folder / MANIFEST_FILE)
        entry_of_text(folder / MANIFEST_FILE, text, pool)
        for each in synced:
            each.result()
    sync_to_disk(folder)


def _publish(partial: Path, final: Path) -> None:
    """Rename the finished folder to its final name.

    An existing checkpoint of that name is removed: first if it is damaged, else after the rename.
    Meanwhile it has the suffix ``OLD`` and still counts as a checkpoint.
    """
    old = final.with_name(final.name + OLD)
    if final.exists():
        try:
            verify_checkpoint(final)
        except DataError:
            _discard(final)
        else:
            _discard(old)
            final.rename(old)
    partial.rename(final)
    sync_to_disk(final.parent)


def _remove_old(new: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints, and the one that ``new`` replaces."""
    replaced = new.with_name(new.name + OLD)
    others = [path for path in checkpoints(new.parent) if path not in (new, replaced)]
    for path in (replaced, *others[: max(0, len(others) - (keep - 1))]):
        try:
            _discard(path)
        except OSError as error:
            logger.warning("the old checkpoint %s could not be removed: %s", path, error)


def _discard(path: Path) -> None:
    """Remove a checkpoint; rename it first, so that a partly removed one is not found."""
    if path.exists():
        doomed = path.with_name(f"{UNFINISHED}removed-{path.name}")
        if doomed.exists():
            shutil.rmtree(doomed)
        path.rename(doomed)
        shutil.rmtree(doomed)


def make_folder(folder: Path) -> None:
    """Create ``folder`` and its parents durably, so that they survive a power failure."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_to_disk(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Remove leftovers of killed runs; warn about those that cannot be removed."""
    for path in list_folder(folder):
        if path.name.startswith(UNFINISHED):
            try:
                shutil.rmtree(path)
            except OSError as error:
                logger.warning("leftover %s could not be removed: %s", path, error)
