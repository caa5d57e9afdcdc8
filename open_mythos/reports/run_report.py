"""From a run's folder to its page."""

from __future__ import annotations

from pathlib import Path

from open_mythos.errors import EnvironmentError_
from open_mythos.reports.run_page import page
from open_mythos.reports.run_record import read_run

PAGE_FILE = "report.html"


def report_run(run: str, out: str = "") -> int:
    """Write the page of a run.

    Args:
        run: Its folder; it may still be going on.
        out: The HTML file to write; by default report.html in the run's folder.

    Raises:
        DataError: The folder holds nothing of a run.
        EnvironmentError_: The page cannot be written.
    """
    record = read_run(run)
    path = Path(out) if out else Path(run) / PAGE_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(record), encoding="utf-8")
    except OSError as error:
        raise EnvironmentError_(
            "the page cannot be written", where=str(path), value=str(error),
            fix="name another file with --out",
        ) from error  # fmt: skip
    print(f"report: {path}")
    return 0
