"""Where a converted model comes from, as a file beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from open_mythos.files import read_text, write_text
from open_mythos.run_folder import PROVENANCE_FILE


@dataclass(frozen=True)
class Provenance:
    """The origin of a converted model.

    Attributes:
        family: Name of the family.
        source: The folder's name, or the name on the hub.
        sha256: Hash of the weight files.
        licence: As the source states it; None if it does not.
        trained_loops: Loops that the source names as its depth.
        gate: Whether the halting gate is trained.
        dropped: Tensors that were not read -> why.
        notes: What differs from the original.
        library: Version that converted it.
    """

    family: str
    source: str
    sha256: str
    licence: str | None
    trained_loops: int
    gate: bool
    dropped: Mapping[str, str]
    notes: tuple[str, ...]
    library: str

    def write(self, folder: Path) -> None:
        """Write the record into the folder of the model."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        write_text(folder / PROVENANCE_FILE, text)


def licence_of(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the licence that a checkpoint states: in its card, its configuration, or as a file."""
    card = folder / "README.md"
    if card.is_file():
        try:
            head = read_text(card, errors="replace").split("---")
        except (OSError, ValueError):  # a card of any size says nothing of the licence
            head = []
        for line in head[1].splitlines() if len(head) > 2 and not head[0].strip() else ():
            key, _, value = line.partition(":")
            if key.strip() == "license" and value.strip():
                return value.strip().strip("\"'")
    if isinstance(config.get("license"), str):
        return config["license"]
    found = sorted(path.name for path in folder.glob("LICENSE*"))
    return f"see {found[0]} of the source" if found else None
