"""Files and command-line options shared by the studies."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Study:
    """The files and options of one study."""

    name: str
    """Name of the module and of the results file."""
    picture: Path
    """Recorded plot, shown in the documentation."""
    description: str
    """One line for ``--help``."""

    @property
    def results(self) -> Path:
        """Return the path of the recorded results."""
        return ROOT / "experiments" / "studies" / "results" / f"{self.name}.json"

    def parse(
        self,
        arguments: Sequence[str] | None,
        add: Callable[[argparse.ArgumentParser], None] | None = None,
    ) -> argparse.Namespace:
        """Parse ``arguments``; a quick run must not overwrite the recorded results.

        ``add`` adds options of the study's own.
        """
        parser = argparse.ArgumentParser(
            prog=f"python -m experiments.studies.{self.name}", description=self.description
        )
        parser.add_argument("--quick", action="store_true", help="smoke test at tiny sizes")
        parser.add_argument("--out", type=Path, default=self.results, help="JSON file of results")
        parser.add_argument(
            "--picture",
            type=Path,
            help="the plot (default: in docs; beside --out if that is given)",
        )
        parser.add_argument(
            "--work", type=Path, default=ROOT / "runs" / self.name, help="folder of prepared text"
        )
        if add is not None:
            add(parser)
        options = parser.parse_args(arguments)
        own = options.out != self.results
        if options.quick and not own:
            parser.error("--quick would overwrite the recorded results: pass another --out")
        options.picture = options.picture or (
            options.out.with_suffix(".png") if own else self.picture
        )
        return options


def load(path: Path) -> dict[str, Any]:
    """Read the results of a study."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
