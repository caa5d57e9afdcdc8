"""Render HTML templates; values are escaped unless they are :class:`Markup`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from open_mythos.files import check_writable, write_text

TEMPLATES = Path(__file__).parent / "templates"
_UNWRITTEN, _ELSEWHERE = "the page cannot be written", "choose another file with --out"


def render(template: str, folder: Path = TEMPLATES, **values: object) -> Markup:
    """Render a file in ``folder`` or :data:`TEMPLATES` with the variables ``values``."""
    return Markup(_environment(folder).get_template(template).render(values))


def check_page(path: Path) -> None:
    """Check, before a page is made, that it can be written and replaces nothing but a page.

    Raises:
        EnvironmentError_: It cannot.
    """
    check_writable(path, _UNWRITTEN, _ELSEWHERE, "<!doctype html>")


def write_html(page: str, path: Path) -> None:
    """Write a page and create its parent folders.

    Raises:
        EnvironmentError_: The file cannot be written.
    """
    write_text(path, page, _UNWRITTEN, _ELSEWHERE)


def heatmap(shares: Sequence[Sequence[float]], full: float) -> Markup:
    """Return a table of the shares of experts by loop; ``full`` has the strongest color."""
    return render("heatmap.html", rows=shares, full=full)


def table(head: Sequence[str], rows: Sequence[Sequence[object]], best: object = None) -> Markup:
    """Return a table with right-aligned numbers; the row whose first cell is ``best`` is bold."""
    return render("table.html", head=head, rows=rows, best=best)


def missing(text: str) -> Markup:
    """Return a paragraph about missing data."""
    return Markup('<p class="missing">{}</p>').format(text)


@cache
def _environment(folder: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([folder, TEMPLATES]), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment
