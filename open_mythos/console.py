"""Tables on consoles of any width."""

from __future__ import annotations

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table


def show(console: Console, table: Table) -> None:
    """Print a table; one line for every cell where the console is narrower than its words."""
    if _needed(console, table) <= console.width:
        console.print(table)
        return
    headings = [str(column.header) for column in table.columns]
    lines = [str(table.title or "")]
    for row in zip(*(column.cells for column in table.columns), strict=True):
        if not any(headings):
            lines.append(": ".join(map(str, row)))
            continue
        lines += ["", *(
            f"{heading}: {cell}" if heading else str(cell)
            for heading, cell in zip(headings, row, strict=True) if str(cell)
        )]  # fmt: skip
    lines += ["", str(table.caption)] if table.caption else []
    console.print("\n".join(lines), highlight=False)


def _needed(console: Console, table: Table) -> int:
    """Return the width at which no word of the table is cut."""
    width = 1
    for column in table.columns:
        cells = map(str, (column.header, *column.cells))
        texts = [console.render_str(cell).plain for cell in cells]
        words = texts if column.no_wrap else (word for text in texts for word in text.split())
        width += max(map(cell_len, words), default=0) + 3
    return width
