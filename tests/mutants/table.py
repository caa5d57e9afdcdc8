"""The table of mutants: what is changed, where, and which tests must fail then.

Each file of ``table/`` is an area. The text of a mutant occurs exactly once in its file, which a
quick test checks, so the table cannot outlive the code it is about.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLES = Path(__file__).parent / "table"


@dataclass(frozen=True)
class Mutant:
    """A change of one place of the code."""

    area: str
    name: str
    """What is wrong with the changed code, in words."""
    file: str
    """Below the package."""
    was: str
    now: str
    tests: tuple[str, ...]
    """Node ids of pytest, of which one fails."""

    @property
    def place(self) -> str:
        """Path of the file from the root of the project."""
        return f"open_mythos/{self.file}"

    def changed(self, source: str) -> str:
        """Return the changed source.

        Raises:
            ValueError: The text is not there, or there more than once.
        """
        found = source.count(self.was)
        if found != 1:
            raise ValueError(f"{self.name}: {found} places in {self.place} hold: {self.was}")
        return source.replace(self.was, self.now)


def mutants() -> list[Mutant]:
    """Read all tables."""
    return [
        Mutant(path.stem.replace("_", " "), **{**each, "tests": tuple(each["tests"])})
        for path in sorted(TABLES.glob("*.toml"))
        for each in tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    ]
