"""The checkpoints of a run: which there are, and which of them is whole."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from open_mythos.errors import DataError, EnvironmentError_
from open_mythos.run_folder import CHECKPOINTS_FOLDER
from open_mythos.train.checkpoint.manifest import read_json, verify_files

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
OLD = ".old"
"""Ends the name of a checkpoint that is being replaced."""
_NAME = re.compile(rf"step_(\d{{8,}})({re.escape(OLD)})?")


def checkpoints(directory: str | Path) -> list[Path]:
    """Return the checkpoints in ``directory``, oldest first, valid or not.

    One that was being replaced when the run was killed comes before the one of its step.

    Raises:
        EnvironmentError_: The folder cannot be read.
    """
    found = [
        (int(match[1]), not match[2], path)
        for path in children(Path(directory))
        if (match := _NAME.fullmatch(path.name))
    ]
    return [path for *_, path in sorted(found)]


def find_checkpoint(source: str | Path, strict: bool = False) -> Path:
    """Return the whole checkpoint that ``source`` stands for: itself, or the newest of a run.

    Damaged checkpoints of a run are skipped with a warning that names the damaged file.

    Args:
        source: Folder of a checkpoint, of a run, or of a run's checkpoints.
        strict: Raise if the newest checkpoint of a run is damaged.

    Raises:
        DataError: There is no whole checkpoint; or the newest, if ``strict``, or the one that was
            named itself, is damaged.
    """
    folder = Path(source)
    if _NAME.fullmatch(folder.name) and folder.is_dir():
        verify_checkpoint(folder)
        return folder
    inner = folder / CHECKPOINTS_FOLDER
    folder = inner if inner.is_dir() else folder
    candidates = checkpoints(folder)
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
        "there is no checkpoint to resume from", where=str(folder),
        value=f"{len(candidates)} checkpoints, none of them whole", allowed="a whole checkpoint",
        fix="name the folder of a run that has saved, or start a new run in another folder",
    )  # fmt: skip


def verify_checkpoint(path: str | Path) -> None:
    """Compare every file with the manifest.

    Raises:
        DataError: A file is missing, superfluous or changed; names it.
    """
    verify_files(Path(path))


def read_state(path: str | Path) -> dict[str, Any]:
    """Return the content of ``state.json``."""
    return read_json(Path(path) / STATE_FILE)


def children(folder: Path) -> list[Path]:
    """Return what lies in ``folder``; nothing if it does not exist."""
    try:
        return list(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise EnvironmentError_(
            "the folder of the checkpoints cannot be read", where=str(folder), value=str(error),
            fix="fix its permissions",
        ) from error  # fmt: skip
