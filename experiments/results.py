"""Finished cells as JSON files, one each, in the folder of a claim and scale."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.claim import Cell, Record
from open_mythos.errors import ConfigError, DataError, EnvironmentError_
from open_mythos.files import sync_to_disk
from open_mythos.train import RunConfig


class Results:
    """The records of one claim at one scale.

    Args:
        folder: Where they are; it is made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, cell: Cell) -> Record | None:
        """The record of ``cell``; None if it is not finished.

        Raises:
            ConfigError: It was finished with other settings.
            DataError: Its file is damaged.
        """
        path = self._path(cell.name)
        if not path.exists():
            return None
        record = _read(path)
        before, now = _complete(record.settings), _complete(plain(cell.settings))
        if before != now:
            differing = sorted(
                key for key in before.keys() | now.keys() if before.get(key) != now.get(key)
            )
            raise ConfigError(
                "a finished cell has other settings", where=str(path),
                value=", ".join(differing) or "settings", allowed="equal settings",
                fix="--fresh runs all cells anew; --out names another folder",
            )  # fmt: skip
        return record

    def of(self, cells: Iterable[Cell]) -> list[Record]:
        """The records of those of ``cells`` that are finished."""
        found = (self.find(cell) for cell in cells)
        return [record for record in found if record is not None]

    def write(self, record: Record) -> Path:
        """Store a record; its file appears whole or not at all."""
        path = self._path(f"{record.arm}-seed{record.seed}")
        text = json.dumps(plain(asdict(record)), indent=1, allow_nan=False) + "\n"
        partial = path.with_suffix(".partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial.write_text(text, encoding="utf-8")
            sync_to_disk(partial)
            os.replace(partial, path)
        except OSError as error:
            raise EnvironmentError_(
                "a result cannot be written", where=str(path), value=str(error),
                fix="name a folder that can be written with --out",
            ) from error  # fmt: skip
        return path

    def clear(self) -> None:
        """Delete every record of the folder, and nothing else."""
        for path in self.folder.glob("*-seed*.json"):
            path.unlink()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def plain(value: Any) -> Any:
    """``value`` as JSON gives it back: tuples become lists, numbers that are not finite None."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _complete(settings: dict[str, Any]) -> dict[str, Any]:
    """With every field of the run: one that a record is older than had its default."""
    if "run" not in settings:
        return settings
    return settings | {"run": plain(RunConfig.from_dict(settings["run"]).to_dict())}


def _read(path: Path) -> Record:
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            "not the record of a cell", where=str(path), value=str(error),
            fix="delete the file and run the claim again",
        ) from error  # fmt: skip
