"""Render the templates of the pages; every value is escaped unless it is :class:`Markup`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from open_mythos.errors import EnvironmentError_


def render(template: str, **values: object) -> Markup:
    """Return ``templates/<template>`` filled with ``values``."""
    return Markup(_environment().get_template(template).render(values))


def write_html(page: str, path: Path) -> None:
    """Write a page, and the folders above it.

    Raises:
        EnvironmentError_: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise EnvironmentError_(
            "the page cannot be written", where=str(path), value=str(error),
            fix="name another file with --out",
        ) from error  # fmt: skip


def heatmap(
    rows: Sequence[Sequence[float]], full: float, *, row: str = "loop", column: str = "expert"
) -> Markup:
    """Return a table whose cells are coloured by their share.

    Args:
        rows: Shares, a list per loop; all of one length.
        full: The share that has the strongest colour.
        row: What a row is; rows count from 1.
        column: What a column is; columns count from 0.
    """
    return render("heatmap.html", rows=rows, full=full, row=row, column=column)


def table(head: Sequence[str], rows: Sequence[Sequence[object]], best: object = None) -> Markup:
    """Return a table; numbers are right-aligned, and the row that begins with ``best`` is bold."""
    return render("table.html", head=head, rows=rows, best=best)


def missing(text: str) -> Markup:
    """Return a paragraph that stands in for what is not there."""
    return Markup('<p class="missing">{}</p>').format(text)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("open_mythos.reports"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment
