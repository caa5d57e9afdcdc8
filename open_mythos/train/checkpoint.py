"""Checkpoints: a directory of safetensors and JSON, complete or not there at all.

    step_00000100/
      config.json, model.safetensors    what `from_pretrained` loads
      optimizer.safetensors             moments, by parameter name
      state.json                        step, tokens, data position, configuration, depths trained
      manifest.json                     size and SHA-256 of every other file; written last

It is written under another name, forced to the disk, renamed into place, and read back before an
older one is removed. All randomness follows from the seed and the step, so there is no generator
state to store.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from open_mythos.errors import DataError, EnvironmentError_
from open_mythos.hub import describe, from_pretrained, save_pretrained
from open_mythos.runtime import sync_to_disk
from open_mythos.train.build import Model

logger = logging.getLogger(__name__)

FORMAT = 1
CHECKPOINTS_FOLDER = "checkpoints"
OPTIMIZER_FILE, STATE_FILE, MANIFEST_FILE = "optimizer.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"step_(\d{8,})")
_UNFINISHED = ".unfinished-"


def save_checkpoint(
    directory: str | Path,
    step: int,
    model: Model,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write ``directory/step_<step>``, verify it, then remove all but the newest ``keep``.

    Args:
        directory: Folder of a run's checkpoints; made if missing.
        step: Optimizer steps done.
        model: Its weights are stored as :func:`open_mythos.hub.save_pretrained` stores them.
        optimizer: Built by :func:`open_mythos.train.optim.build_optimizer`.
        state: JSON-ready; what :func:`load_checkpoint` gives back.
        keep: Checkpoints that stay, the new one included.

    Raises:
        EnvironmentError_: The disk is full or cannot be written; older checkpoints are untouched.
    """
    folder, name = Path(directory), f"step_{step:08d}"
    partial = folder / f"{_UNFINISHED}{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
        partial.mkdir()
        save_pretrained(model, partial)
        save_file(_optimizer_tensors(optimizer), partial / OPTIMIZER_FILE)
        _write_json(partial / STATE_FILE, state)
        for path in partial.iterdir():
            sync_to_disk(path)
        _write_json(partial / MANIFEST_FILE, _manifest(partial))
        sync_to_disk(partial / MANIFEST_FILE)
        sync_to_disk(partial)
        _publish(partial, folder / name)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise EnvironmentError_(
            "the checkpoint could not be written", where=str(folder / name), value=str(error),
            fix="make room or mend the permissions, then resume; older checkpoints are untouched",
        ) from error  # fmt: skip
    verify_checkpoint(folder / name)
    others = [path for path in checkpoints(folder) if path.name != name]
    for path in others[: max(0, len(others) - (keep - 1))]:
        shutil.rmtree(path, ignore_errors=True)
    return folder / name


def checkpoints(directory: str | Path) -> list[Path]:
    """The checkpoints in ``directory``, oldest first, valid or not."""
    folder = Path(directory)
    found = [
        (int(match[1]), path) for path in _children(folder) if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


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
    """Compare every file with the manifest.

    Raises:
        DataError: A file is missing, superfluous or changed; names it.
    """
    folder = Path(path)
    manifest = _read_json(folder / MANIFEST_FILE)
    files = manifest.get("files")
    if manifest.get("format") != FORMAT or not isinstance(files, dict):
        raise _damaged(folder / MANIFEST_FILE, manifest.get("format"), f"format {FORMAT}")
    # the manifest vouches for itself by its form: a lost last byte would still be JSON
    if (folder / MANIFEST_FILE).read_text(encoding="utf-8") != _json(manifest):
        raise _damaged(folder / MANIFEST_FILE, "another form", "as it was written")
    names = {each.name for each in _children(folder)} - {MANIFEST_FILE}
    for name in sorted(names ^ files.keys()):
        expected = "as listed in the manifest" if name in files else "no file of this name"
        raise _damaged(folder / name, "present" if name in names else "missing", expected)
    for name, expected in files.items():
        found = _fingerprint(folder / name)
        if found != expected:
            raise _damaged(folder / name, found, str(expected))


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
    return _read_json(Path(path) / STATE_FILE)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """ "parameter name/moment" -> tensor."""
    tensors = {}
    for name, parameter in _named(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value.detach().contiguous()
    return tensors


def _optimizer_state(path: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What ``optimizer.load_state_dict`` takes, from the file at ``path``."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, str(error), "a safetensors file") from error
    parameters = dict(_named(optimizer))
    number = {name: i for i, name in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, moment = key.rpartition("/")
        fits = name in parameters and (not value.dim() or value.shape == parameters[name].shape)
        if not fits:
            raise _damaged(
                path, f"{key} {tuple(value.shape)}", "moments of this model's parameters"
            )
        state.setdefault(number[name], {})[moment] = value
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def _named(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    return [
        pair
        for group in optimizer.param_groups
        for pair in zip(group["param_names"], group["params"], strict=True)
    ]


def _manifest(folder: Path) -> dict[str, Any]:
    files = {path.name: _fingerprint(path) for path in sorted(folder.iterdir())}
    return {"format": FORMAT, "files": files}


def _fingerprint(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"bytes": file.tell(), "sha256": digest}
    except OSError as error:
        raise _damaged(path, str(error), "a readable file") from error


def _publish(partial: Path, final: Path) -> None:
    """Give the finished folder its name; a damaged one of that name makes room."""
    replaced = final.with_name(f"{_UNFINISHED}replaced-{final.name}")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync_to_disk(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_unfinished(folder: Path) -> None:
    """What a killed run left behind."""
    for path in _children(folder):
        if path.name.startswith(_UNFINISHED):
            shutil.rmtree(path)


def _children(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(_json(values), encoding="utf-8")


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error), "a JSON object") from error
    if not isinstance(values, dict):
        raise _damaged(path, values, "a JSON object")
    return values


def _damaged(path: Path, value: Any, allowed: str) -> DataError:
    return DataError(
        "the checkpoint is damaged", where=str(path), value=value, allowed=allowed,
        fix="resume from an older checkpoint, or copy this one again",
    )  # fmt: skip
