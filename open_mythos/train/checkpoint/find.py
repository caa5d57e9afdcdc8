"""Find the checkpoints of a run, and the newest one that is intact."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from open_mythos.checks import checked
from open_mythos.errors import DataError, EnvironmentError_
from open_mythos.run_folder import CHECKPOINTS_FOLDER, STATE_FILE, validated_record
from open_mythos.train.checkpoint.manifest import read_json, verify_checkpoint

logger = logging.getLogger(__name__)

OLD = ".old"
"""Suffix of a checkpoint that is being replaced."""
_NAME = re.compile(rf"step_(\d{{8,}})({re.escape(OLD)})?")


def checkpoints(directory: str | Path) -> list[Path]:
    """Return the checkpoints in ``directory``, oldest first, intact or not.

    A checkpoint with the suffix :data:`OLD` precedes the one that replaces it.

    Raises:
        EnvironmentError_: The folder cannot be read.
    """
    found = [
        (int(match[1]), not match[2], path)
        for path in list_folder(Path(directory))
        if (match := _NAME.fullmatch(path.name))
    ]
    return [path for *_, path in sorted(found)]


@checked
def find_checkpoint(source: str | Path, strict: bool = False) -> Path:
    """Return ``source`` if it is a checkpoint, else the newest intact checkpoint of that run.

    Damaged checkpoints of a run are skipped with a warning that names the damaged file.

    Args:
        source: Folder of a checkpoint, of a run, or of a run's checkpoints.
        strict: Raise if the newest checkpoint of a run is damaged.

    Raises:
        DataError: No checkpoint is intact, ``source`` is a damaged checkpoint, or ``strict`` and
            the newest one is damaged.
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
            logger.warning("skipping the damaged checkpoint %s:\n%s", path, error)
        else:
            return path
    raise DataError(
        "there is no checkpoint to resume from", where=str(folder),
        value=f"{len(candidates)} checkpoints, none of them intact",
        allowed="an intact checkpoint",
        fix="pass the folder of a run that has saved; a run that has not saved yet starts again "
        "with --resume auto",
    )  # fmt: skip


@checked
def read_state(path: str | Path) -> dict[str, Any]:
    """Return the content of ``state.json``."""
    folder = Path(path)
    validated_record(folder)  # refuses what is none
    return read_json(folder / STATE_FILE)


def list_folder(folder: Path) -> list[Path]:
    """Return the entries of ``folder``; none if it does not exist."""
    try:
        return list(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise EnvironmentError_(
            "the folder of the checkpoints cannot be read", where=str(folder), value=str(error),
            allowed="a readable folder",
            fix="fix its permissions",
        ) from error  # fmt: skip
