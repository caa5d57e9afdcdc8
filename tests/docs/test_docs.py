"""The documentation says what the code does: programs run, tables and quotes are current."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import yaml
from doc_blocks import PAGES, ROOT, field_docs, made_blocks, remade
from helpers import small_config

import open_mythos
from open_mythos import MythosConfig, OpenMythos, errors

REFERENCE = ROOT / "docs" / "open_mythos.md"
_FENCE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
_TEST = re.compile(r"`(tests/[\w/]+\.py)::([\w:]+)`")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", without_code(read(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_run(page: Path) -> None:
    """All blocks of a page, in order, as one program."""
    text, namespace = read(page), {"__name__": "page"}
    for block in _FENCE.finditer(text):
        line = text[: block.start(1)].count("\n")  # so that a traceback names the page's line
        exec(compile("\n" * line + block[1], str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_and_quotes_are_current(page: Path) -> None:
    """Otherwise: python tests/docs/doc_blocks.py"""
    assert read(page) == remade(read(page))


def test_tables_and_quotes_are_there() -> None:
    assert made_blocks(read(REFERENCE)) == ["config", "variants", "cache"]
    quoted = made_blocks(read(ROOT / "docs" / "architecture.md"))
    assert {"RecurrentBlock.step", "RecurrentBlock.forward"} <= set(quoted)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(without_code(read(page))):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)}: {link}"
        assert target.is_relative_to(ROOT), f"{name_of(page)}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{name_of(page)}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_tests_exist(page: Path) -> None:
    for path, names in _TEST.findall(read(page)):
        source = (ROOT / path).read_text(encoding="utf-8") if (ROOT / path).is_file() else ""
        *classes, test = names.split("::")
        found = [re.search(rf"^class {each}\b", source, re.MULTILINE) for each in classes]
        found.append(re.search(rf"^ *(?:async )?def {test}\(", source, re.MULTILINE))
        assert all(found), f"{name_of(page)}: {path}::{names}"


def test_navigation_lists_every_page() -> None:
    site = yaml.safe_load(read(ROOT / "mkdocs.yml"))
    listed = [path for entry in site["nav"] for path in entry.values()]
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_every_field_is_documented() -> None:
    assert set(field_docs()) == set(MythosConfig().to_dict())


def test_every_public_name_is_in_the_reference() -> None:
    text = read(REFERENCE)
    variants = {name for name in open_mythos.__all__ if name.startswith("mythos_")}
    missing = [n for n in open_mythos.__all__ if not re.search(rf"`[^`\n]*\b{n}\b", text)]
    assert set(missing) - variants == set()
    assert all(f"`{name}`" in text for name in variants)


@pytest.mark.parametrize("method", [OpenMythos.forward, OpenMythos.generate, OpenMythos.context])
def test_every_argument_is_in_the_reference(method: object) -> None:
    text = read(REFERENCE)
    for name in inspect.signature(method).parameters:
        assert name == "self" or f"`{name}" in text, name


def test_exit_codes() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (\d+) \|", read(REFERENCE), re.MULTILINE)
    assert len(rows) == 4
    for name, base, code in rows:
        error = getattr(errors, name)
        assert error.exit_code == int(code)
        assert base in [parent.__name__ for parent in error.__mro__]


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_names_in_the_state_dict(attn_type: str) -> None:
    """Every parameter is in the right-hand column of the table, at least by its last part."""
    text = read(ROOT / "docs" / "compat.md")
    table = text.partition("## Names in the state dict")[2].partition("\n## ")[0]
    right = " ".join(row.split("|")[2] for row in table.splitlines() if row.startswith("| "))
    same = {"head", "attn_norm", "ffn_norm", "q_down", "q_norm", "kv_down", "kv_norm", "kv_up"}
    same |= {"log_A", "B", "router", "router_bias", "shared"}
    for name in OpenMythos(small_config(attn_type)).state_dict():
        part = name.removesuffix(".weight").rpartition(".")[2]
        assert part in same or re.search(rf"\b{part}\b", right), name


def test_version() -> None:
    version = open_mythos.__version__
    assert f"## [{version}]" in read(ROOT / "CHANGELOG.md")
    assert yaml.safe_load(read(ROOT / "CITATION.cff"))["version"] == version
