"""Read and write results: ``benchmarks/results/<machine>/<suite>.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
_DERIVED = ("verdict", "share", "reason")


def as_json(row: Any) -> dict[str, Any]:
    """Return a row's class name, fields and derived properties."""
    assert is_dataclass(row)
    assert not isinstance(row, type)
    derived = {name: getattr(row, name) for name in _DERIVED if hasattr(row, name)}
    return {"kind": type(row).__name__} | asdict(row) | derived


def save(folder: Path, suite: str, content: Mapping[str, Any]) -> Path:
    """Write a suite's file atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{suite}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def machines(results: Path = RESULTS) -> list[Path]:
    """Return the folders of all machines with results."""
    return sorted({path.parent for path in results.glob("*/*.json")})


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Return suite -> content of its file."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.json"))
    }
