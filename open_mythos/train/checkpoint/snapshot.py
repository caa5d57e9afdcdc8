"""Checkpoints: a directory of safetensors and JSON, complete or not there at all.

    step_00000100/
      config.json, model.safetensors    what `from_pretrained` loads
      optimizer.safetensors             moments, by parameter name
      state.json                        step, tokens, data position, configuration, depths trained
      manifest.json                     size and hashes of every other file; written last

Written under a temporary name, synced, verified and renamed; then old ones are deleted. Randomness
follows from seed and step, so no generator state is stored. Format: docs/checkpoint_format.md.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from open_mythos.errors import DataError, EnvironmentError_
from open_mythos.files import sync_to_disk
from open_mythos.hub.pretrained import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    describe,
    from_pretrained,
    model_tensors,
)
from open_mythos.run_folder import CHECKPOINTS_FOLDER
from open_mythos.train.build import Model
from open_mythos.train.checkpoint.manifest import (
    MANIFEST_FILE,
    Entry,
    as_json,
    damaged,
    entry_of_tensors,
    entry_of_text,
    manifest_text,
    read_json,
    verify_files,
)
from open_mythos.train.optimizers.optim import moments_of

logger = logging.getLogger(__name__)

OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "state.json"
_OLD = ".old"
_NAME = re.compile(rf"step_(\d{{8,}})({re.escape(_OLD)})?")
_UNFINISHED = ".unfinished-"

Extra = Mapping[str, Mapping[str, Tensor]]
"""Further safetensors file of a checkpoint -> name -> tensor."""


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint will hold, on the CPU."""

    step: int
    """Optimizer steps done."""
    tensors: Mapping[str, Mapping[str, Tensor]]
    """File -> name -> tensor, contiguous."""
    texts: Mapping[str, str]
    """File -> content."""

    @property
    def name(self) -> str:
        """Of the checkpoint's folder."""
        return f"step_{self.step:08d}"


def take_snapshot(
    step: int,
    model: Model,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    *,
    extra: Extra | None = None,
    copy: bool = False,
) -> Snapshot:
    """Collect what a checkpoint will hold.

    Args:
        step: Optimizer steps done.
        model: Stored as :func:`open_mythos.hub.pretrained.save_pretrained` stores it.
        optimizer: Built by :func:`open_mythos.train.optimizers.optim.build_optimizer`.
        state: JSON-ready; what :func:`load_checkpoint` gives back.
        extra: Further safetensors files and their tensors.
        copy: Copy CPU tensors instead of sharing them; takes as much memory as the checkpoint.
    """
    tensors = {
        file: {name: each.to("cpu", copy=copy).contiguous() for name, each in tensors.items()}
        for file, tensors in stored_tensors(model, optimizer, extra).items()
    }
    texts = {CONFIG_FILE: as_json(describe(model)), STATE_FILE: as_json(state)}
    return Snapshot(step, tensors, texts)


def stored_tensors(
    model: Model, optimizer: torch.optim.Optimizer, extra: Extra | None = None
) -> dict[str, Mapping[str, Tensor]]:
    """File -> name -> tensor of a checkpoint, where they are; moments not yet made are missing."""
    return {
        WEIGHTS_FILE: model_tensors(model),
        OPTIMIZER_FILE: _optimizer_tensors(optimizer),
        **{
            file: {name: each.detach() for name, each in tensors.items()}
            for file, tensors in (extra or {}).items()
        },
    }


def save_checkpoint(
    directory: str | Path,
    step: int,
    model: Model,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """:func:`write_snapshot` of the present; :class:`Saver` does more."""
    return write_snapshot(directory, take_snapshot(step, model, optimizer, state), keep)


def write_snapshot(directory: str | Path, snapshot: Snapshot, keep: int) -> Path:
    """Write ``directory/step_<step>``, verify it, then remove all but the newest ``keep``.

    Args:
        directory: Folder of a run's checkpoints; made if missing.
        snapshot: What to write.
        keep: Checkpoints that stay, the new one included.

    Raises:
        EnvironmentError_: The disk is full, cannot be written, or does not give back what was
            written; older checkpoints are untouched.
    """
    folder, name = Path(directory), snapshot.name
    partial = unfinished(folder, name)
    try:
        begin_folder(partial)
        fill_folder(partial, snapshot)
        publish(partial, folder / name)
    except (OSError, SafetensorError) as error:
        raise EnvironmentError_(
            "the checkpoint could not be written", where=str(folder / name), value=str(error),
            fix="make room or mend the permissions, then resume; older checkpoints are untouched",
        ) from error  # fmt: skip
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    remove_old(folder / name, keep)
    return folder / name


def checkpoints(directory: str | Path) -> list[Path]:
    """The checkpoints in ``directory``, oldest first, valid or not.

    One that was about to be replaced when the run was killed comes before the one of its step.

    Raises:
        EnvironmentError_: The folder cannot be read.
    """
    found = [
        (int(match[1]), not match[2], path)
        for path in _children(Path(directory))
        if (match := _NAME.fullmatch(path.name))
    ]
    return [path for *_, path in sorted(found)]


def usable_checkpoint(directory: str | Path, strict: bool = False) -> Path:
    """The newest checkpoint in ``directory`` whose every byte is as it was written.

    Damaged ones are passed over with a warning that names the damaged file.

    Args:
        directory: Folder of a run's checkpoints.
        strict: Refuse instead of passing over.

    Raises:
        DataError: There is none; or, if ``strict``, the newest is damaged.
    """
    candidates = checkpoints(directory)
    for path in reversed(candidates):
        try:
            verify_checkpoint(path)
        except DataError as error:
            if strict:
                raise
            logger.warning("passing over the damaged checkpoint %s:\n%s", path, error)
        else:
            return path
    raise DataError(
        "there is no checkpoint to resume from", where=str(directory),
        value=f"{len(candidates)} checkpoints, none of them whole", allowed="a whole checkpoint",
        fix="name the folder of a run that has saved, or start a new run in another folder",
    )  # fmt: skip


def find_checkpoint(source: str | Path, strict: bool = False) -> Path:
    """The whole checkpoint that ``source`` stands for: itself, or the newest of a run.

    Raises:
        DataError: As of :func:`usable_checkpoint`; a checkpoint named itself has no stand-in.
    """
    folder = Path(source)
    if _NAME.fullmatch(folder.name) and folder.is_dir():
        verify_checkpoint(folder)
        return folder
    inner = folder / CHECKPOINTS_FOLDER
    return usable_checkpoint(inner if inner.is_dir() else folder, strict)


def verify_checkpoint(path: str | Path) -> None:
    """Compare every file with the manifest; raise a DataError that names one that differs."""
    verify_files(Path(path))


def load_checkpoint(
    path: str | Path, model: Model, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Load a verified checkpoint into ``model`` and ``optimizer``; returns its state.

    Nothing is changed unless everything fits.

    Raises:
        DataError: A file cannot be read, or belongs to another model.
    """
    folder = Path(path)
    state = read_state(folder)
    stored = from_pretrained(folder)
    if describe(stored) != describe(model):
        raise DataError(
            "the checkpoint is of another model", where=str(folder), value=describe(stored),
            allowed=str(describe(model)), fix="build the model from the checkpoint's configuration",
        )  # fmt: skip
    moments = _optimizer_state(folder / OPTIMIZER_FILE, optimizer)
    model.load_state_dict(stored.state_dict())
    optimizer.load_state_dict(moments)
    return state


def read_state(path: str | Path) -> dict[str, Any]:
    """The content of ``state.json``."""
    return read_json(Path(path) / STATE_FILE)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """ "parameter name/moment" -> tensor."""
    tensors = {}
    for name, parameter in named_parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value.detach().contiguous()
    return tensors


def _optimizer_state(path: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What ``optimizer.load_state_dict`` takes, from the file at ``path``."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise damaged(path, str(error), "a safetensors file") from error
    parameters = dict(named_parameters(optimizer))
    number, kept = {name: i for i, name in enumerate(parameters)}, moments_of(optimizer)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, moment = key.rpartition("/")
        fits = moment in kept.get(name, ()) and value.shape in ((), parameters[name].shape)
        if not fits:
            raise damaged(
                path, f"{key} {tuple(value.shape)}", "moments of this optimizer and model"
            )
        state.setdefault(number[name], {})[moment] = value
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def named_parameters(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """The optimizer's parameters with their names, in its order."""
    return [
        pair
        for group in optimizer.param_groups
        for pair in zip(group["param_names"], group["params"], strict=True)
    ]


def fill_folder(
    folder: Path, snapshot: Snapshot, others: Mapping[str, Entry] | None = None
) -> None:
    """Write all files into ``folder``, force them to the disk and read them back.

    Disk and hashing go on beside the writing: neither waits for the other.

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
            # the library makes files that only their owner can read, whatever the umask is
            path.chmod(folder.stat().st_mode & 0o666)
            synced.append(jobs.submit(sync_to_disk, path))
            entries[name] = jobs.submit(entry_of_tensors, path, tensors, pool)
        for name, text in snapshot.texts.items():
            _write_text(folder / name, text)
            synced.append(jobs.submit(sync_to_disk, folder / name))
            entries[name] = jobs.submit(entry_of_text, folder / name, text, pool)
        text = manifest_text(
            {name: entry.result() for name, entry in entries.items()} | dict(others or {})
        )
        _write_text(folder / MANIFEST_FILE, text)
        sync_to_disk(folder / MANIFEST_FILE)
        entry_of_text(folder / MANIFEST_FILE, text, pool)
        for each in synced:
            each.result()
    sync_to_disk(folder)


def publish(partial: Path, final: Path) -> None:
    """Give the finished folder its name.

    One that has the name already goes: at once if it is damaged, else when the new one is there.
    Until then it is kept under a name that :func:`checkpoints` knows.
    """
    old = final.with_name(final.name + _OLD)
    if final.exists():
        if _is_whole(final):
            _discard(old)
            final.rename(old)
        else:
            _discard(final)
    partial.rename(final)
    sync_to_disk(final.parent)


def remove_old(new: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints, and what ``new`` replaces."""
    replaced = new.with_name(new.name + _OLD)
    others = [path for path in checkpoints(new.parent) if path not in (new, replaced)]
    for path in (replaced, *others[: max(0, len(others) - (keep - 1))]):
        try:
            _discard(path)
        except OSError as error:
            logger.warning("the old checkpoint %s could not be removed: %s", path, error)


def _discard(path: Path) -> None:
    """Remove a checkpoint; half removed, it no longer has the name of one."""
    if path.exists():
        doomed = path.with_name(f"{_UNFINISHED}removed-{path.name}")
        if doomed.exists():
            shutil.rmtree(doomed)
        path.rename(doomed)
        shutil.rmtree(doomed)


def _is_whole(path: Path) -> bool:
    try:
        verify_checkpoint(path)
    except DataError:
        return False
    return True


def unfinished(directory: Path, name: str) -> Path:
    """Where the checkpoint of this name is written."""
    return directory / f"{_UNFINISHED}{name}"


def begin_folder(partial: Path) -> None:
    """Make the empty folder of :func:`unfinished`; what a killed run left beside it goes."""
    make_folder(partial.parent)
    remove_unfinished(partial.parent)
    partial.mkdir()


def make_folder(folder: Path) -> None:
    """Make ``folder`` and what is missing above it, so that a power cut does not undo it."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_to_disk(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed run left behind; what cannot be removed is named in a warning."""
    for path in _children(folder):
        if path.name.startswith(_UNFINISHED):
            try:
                shutil.rmtree(path)
            except OSError as error:
                logger.warning("leftover %s could not be removed: %s", path, error)


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise EnvironmentError_(
            "the folder of the checkpoints cannot be read", where=str(folder), value=str(error),
            fix="mend its permissions",
        ) from error  # fmt: skip


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
