"""Store finished cells as JSON files, one per cell."""

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
    """The records of one claim at one scale, in ``folder`` (created on the first write)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, cell: Cell) -> Record | None:
        """Return the record of ``cell``, or None if it is not finished.

        Raises:
            ConfigError: The cell was recorded with different settings.
            DataError: The file is corrupt.
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
                "a finished cell was recorded with different settings", where=str(path),
                value=", ".join(differing) or "settings", allowed="the current settings",
                fix="pass --fresh to rerun all cells, or --out to use another folder",
            )  # fmt: skip
        return record

    def of(self, cells: Iterable[Cell]) -> list[Record]:
        """Return the records of the finished cells among ``cells``."""
        found = (self.find(cell) for cell in cells)
        return [record for record in found if record is not None]

    def write(self, record: Record) -> Path:
        """Write a record atomically and return its path."""
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
                "cannot write a result", where=str(path), value=str(error),
                fix="pass a writable folder as --out",
            ) from error  # fmt: skip
        return path

    def clear(self) -> None:
        """Delete the records in the folder and leave other files alone."""
        for path in self.folder.glob("*-seed*.json"):
            path.unlink()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def plain(value: Any) -> Any:
    """Convert ``value`` to JSON types: tuples become lists, non-finite floats None."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _complete(settings: dict[str, Any]) -> dict[str, Any]:
    """Fill in run fields added since the record was written with their defaults."""
    if "run" not in settings:
        return settings
    return settings | {"run": plain(RunConfig.from_dict(settings["run"]).to_dict())}


def _read(path: Path) -> Record:
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            "not a cell record", where=str(path), value=str(error),
            fix="delete the file and rerun the claim",
        ) from error  # fmt: skip
