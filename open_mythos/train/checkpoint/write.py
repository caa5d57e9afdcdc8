"""Writes a checkpoint so that its folder is whole or not there at all, for one process or many.

It is written under another name, forced to the disk, read back, and only then renamed into place;
older ones go after that. A replicated model is written by the first process. A sharded one is
written by all, each its own parts (:mod:`open_mythos.hub.sharded_tensors`); the manifest covers the
files of all. An error in one process is raised in every one, so that they retry, or stop, together.
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

from open_mythos.distributed import rank, world_size
from open_mythos.errors import DataError, EnvironmentError_, MythosError
from open_mythos.files import sync_to_disk
from open_mythos.hub.sharded_tensors import holds_parts, write_shards
from open_mythos.train.checkpoint.find import OLD, checkpoints, children, verify_checkpoint
from open_mythos.train.checkpoint.manifest import (
    MANIFEST_FILE,
    Entry,
    entry_of_file,
    entry_of_tensors,
    entry_of_text,
    manifest_text,
)
from open_mythos.train.checkpoint.snapshot import Snapshot

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished-"
"""Begins the name of whatever is half written or half removed."""

T = TypeVar("T")


def write_checkpoint(
    directory: Path, snapshot: Snapshot, keep: int, group: dist.ProcessGroup | None = None
) -> Path:
    """Write ``directory/step_<step>``, verify it, then remove all but the newest ``keep``.

    Args:
        directory: Folder of a run's checkpoints, the same for all processes; made if missing.
        snapshot: Of this process: whole tensors, the same in all, or DTensors.
        keep: Checkpoints that stay, the new one included.
        group: All processes of the run, which call this together; None for a single process.

    Raises:
        EnvironmentError_: The disk is full, cannot be written, or does not give back what was
            written, in some process; older checkpoints are untouched.
    """
    final, partial = directory / snapshot.name, directory / f"{UNFINISHED}{snapshot.name}"
    first, entries = rank() == 0, dict[str, Entry]()
    sharded = any(holds_parts(tensors) for tensors in snapshot.tensors.values())

    def finish() -> None:
        if first:
            content = replace(snapshot, tensors={}) if sharded else snapshot
            fill_folder(partial, content, entries)
            _publish(partial, final)

    try:
        together(group, final, lambda: _begin(partial) if first else None)
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
    """Call ``action()`` in all processes; raise its error in one of them in all.

    Raises:
        MythosError: That of the first process that had one.
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
            fix="make room or fix the permissions, then resume; older checkpoints are untouched",
        )  # fmt: skip
        error.__cause__ = mine if group is None else None
    errors = [error]
    if group is not None:
        errors = [None] * world_size()
        dist.all_gather_object(errors, error, group)
    first = next((each for each in errors if each is not None), None)
    if first is not None:
        raise first
    return result


def _write_parts(
    partial: Path, final: Path, snapshot: Snapshot, group: dist.ProcessGroup | None
) -> dict[str, Entry]:
    """Write the tensors of a sharded model; return the manifest's entries of all their files."""
    parts = {
        f"{Path(file).stem}/{name}": tensor
        for file, tensors in snapshot.tensors.items()
        for name, tensor in tensors.items()
    }
    files = write_shards(partial, parts, group)
    mine = together(group, final, lambda: _entries(files))
    everyone: list[dict[str, Entry]] = [{} for _ in range(world_size())]
    dist.all_gather_object(everyone, mine, group)
    return {name: entry for each in everyone for name, entry in each.items()}


def _entries(files: list[Path]) -> dict[str, Entry]:
    """Return the manifest's entries of files that this process has written."""
    with ThreadPoolExecutor() as pool:
        for path in files:
            sync_to_disk(path)
        return {path.name: entry_of_file(path, pool) for path in files}


def fill_folder(folder: Path, snapshot: Snapshot, others: Mapping[str, Entry]) -> None:
    """Write all files into ``folder``, force them to the disk and read them back.

    Writing, fsync and hashing overlap.

    Args:
        folder: Holds nothing but the files of ``others``.
        snapshot: What to write.
        others: The manifest's entries of files that are there already.
    """
    with ThreadPoolExecutor() as jobs, ThreadPoolExecutor() as pool:
        synced, entries = [], {}
        for name, tensors in snapshot.tensors.items():
            path = folder / name
            save_file(dict(tensors), path, metadata={"format": "pt"})
            # safetensors makes files that only their owner can read, whatever the umask is
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
    """Give the finished folder its name.

    A checkpoint that has the name already is removed: at once if it is damaged, else when the new
    one is there. Until then it is kept under a name that :func:`checkpoints` knows.
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
    """Remove all but the newest ``keep`` checkpoints, and what ``new`` replaces."""
    replaced = new.with_name(new.name + OLD)
    others = [path for path in checkpoints(new.parent) if path not in (new, replaced)]
    for path in (replaced, *others[: max(0, len(others) - (keep - 1))]):
        try:
            _discard(path)
        except OSError as error:
            logger.warning("the old checkpoint %s could not be removed: %s", path, error)


def _discard(path: Path) -> None:
    """Remove a checkpoint; half removed, it no longer has the name of one."""
    if path.exists():
        doomed = path.with_name(f"{UNFINISHED}removed-{path.name}")
        if doomed.exists():
            shutil.rmtree(doomed)
        path.rename(doomed)
        shutil.rmtree(doomed)


def _begin(partial: Path) -> None:
    """Make the empty folder to write into; remove what a killed run left beside it."""
    make_folder(partial.parent)
    remove_unfinished(partial.parent)
    partial.mkdir()


def make_folder(folder: Path) -> None:
    """Make ``folder`` and its parents, so that a power failure does not undo it."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_to_disk(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed run left behind; name what cannot be removed in a warning."""
    for path in children(folder):
        if path.name.startswith(UNFINISHED):
            try:
                shutil.rmtree(path)
            except OSError as error:
                logger.warning("leftover %s could not be removed: %s", path, error)
