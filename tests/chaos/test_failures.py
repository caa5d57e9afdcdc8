"""``docs/failures.md`` quotes what really ran."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from chaos import failures


@pytest.mark.goal("docs", "each failure of docs/failures.md made to happen")
def test_the_table_is_what_happens(forks, data, straight, row):
    """Otherwise: python tests/chaos/failures.py"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        rows = failures.table(
            lambda number: failures.made(folder / str(number), forks, data, straight.out)
        )
    assert failures.PAGE.read_text(encoding="utf-8") == failures.page(rows)
    row.count(len(failures.FAILURES))
    row.outcome = "what it says is what the page quotes"
