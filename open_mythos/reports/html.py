"""Render the templates of the pages; every value is escaped unless it is :class:`Markup`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from open_mythos.errors import EnvironmentError_

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, folder: Path = TEMPLATES, **values: object) -> Markup:
    """Fill a template.

    Args:
        template: Name of a file in ``folder``, or in :data:`TEMPLATES`.
        folder: Where another package keeps templates of its own, which may extend ``page.html``.
        values: What the template may use.
    """
    return Markup(_environment(folder).get_template(template).render(values))


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


def heatmap(shares: Sequence[Sequence[float]], full: float) -> Markup:
    """Return a table of experts by loop, whose cells are coloured by their share.

    Args:
        shares: A list over the experts for each loop.
        full: The share that has the strongest colour.
    """
    return render("heatmap.html", rows=shares, full=full)


def table(head: Sequence[str], rows: Sequence[Sequence[object]], best: object = None) -> Markup:
    """Return a table; numbers are right-aligned, and the row that begins with ``best`` is bold."""
    return render("table.html", head=head, rows=rows, best=best)


def missing(text: str) -> Markup:
    """Return a paragraph that stands in for what is not there."""
    return Markup('<p class="missing">{}</p>').format(text)


@cache
def _environment(folder: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([folder, TEMPLATES]), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment
