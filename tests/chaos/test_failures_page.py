"""``docs/failures.md`` quotes what really ran."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from chaos import failures_page


@pytest.mark.goal("docs", "each failure of docs/failures.md made to happen")
@pytest.mark.slow
def test_the_table_is_what_happens(forks, data, straight, row):
    """Otherwise: python tests/chaos/failures_page.py"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        rows = failures_page.table(
            lambda number: failures_page.made(folder / str(number), forks, data, straight.out)
        )
    assert failures_page.PAGE.read_text(encoding="utf-8") == failures_page.page(rows)
    row.count(len(failures_page.FAILURES))
    row.outcome = "what it says is what the page quotes"
