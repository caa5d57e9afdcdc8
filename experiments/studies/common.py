"""What the studies share: where their files are, their options, reading what they wrote."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Study:
    """The files and options of one study."""

    name: str
    """Name of its module and of its results."""
    picture: Path
    """The recorded plot, a page of the documentation shows it."""
    description: str
    """One line for ``--help``."""

    @property
    def results(self) -> Path:
        """The recorded results."""
        return ROOT / "experiments" / "studies" / "results" / f"{self.name}.json"

    def parser(self) -> argparse.ArgumentParser:
        """Build the parser of the options that all studies have."""
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
        return parser

    def parse(
        self, parser: argparse.ArgumentParser, arguments: Sequence[str] | None
    ) -> argparse.Namespace:
        """Read ``arguments``; only a whole run of the study may replace its recorded results.

        An option ``checkpoint`` of ``parser`` makes a run partial, as ``--quick`` does.
        """
        options = parser.parse_args(arguments)
        own = options.out != self.results
        if not own and (options.quick or getattr(options, "checkpoint", "")):
            parser.error("this would replace the recorded results: name another --out")
        options.picture = options.picture or (
            options.out.with_suffix(".png") if own else self.picture
        )
        return options


def load(path: Path) -> dict[str, Any]:
    """Read the results that a study wrote."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
