"""Imports flow one way, as the tables of docs/architecture.md say; read from the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "open_mythos"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = {
    file: ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for file in FILES
}
OUTSIDE = {"benchmarks", "experiments", "examples", "tests", "training"}
LIGHT = ("errors", "checks", "config", "variants")
"""Modules that load nothing but these modules of the standard library, so that --help is quick."""
STANDARD = {
    "__future__", "builtins", "collections", "dataclasses", "difflib", "functools", "inspect",
    "math", "operator", "pathlib", "reprlib", "types", "typing", "unicodedata",
}  # fmt: skip


@cache
def levels(title: str) -> dict[str, int]:
    """Level by name, from the table of docs/architecture.md whose second column is ``title``."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.partition(f"| level | {title} |\n")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", table, re.MULTILINE)
    return {name: int(level) for level, names in rows for name in re.findall(r"`(\w+)`", names)}


@cache
def imports(file: Path) -> tuple[str, ...]:
    """Every module that a file imports, wherever in the file."""
    found: list[str] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module
            found.append(node.module)
            submodules = (f"{node.module}.{alias.name}" for alias in node.names)
            found += [name for name in submodules if name in set(NAMES.values())]
    return tuple(found)


def upward(prefix: str, level: dict[str, int]) -> Iterator[str]:
    """Imports below ``prefix`` whose target stands on a higher level than the file itself."""

    def part(module: str) -> str | None:
        pieces = module.removeprefix(prefix).split(".")
        return pieces[0] if module.startswith(prefix) else None

    for file, name in NAMES.items():
        own = part(name)
        for module in imports(file) if own is not None else ():
            other = part(module)
            if other is not None and level[other] > level[own]:
                yield f"{name} imports {module}"


def test_every_part_has_a_level():
    assert set(levels("parts")) == {n.split(".")[1] for n in NAMES.values() if "." in n}
    inner = {n.split(".")[2] for n in NAMES.values() if n.startswith("open_mythos.model.")}
    assert set(levels("files of `model`")) == inner


def test_imports_flow_one_way():
    assert not list(upward("open_mythos.", levels("parts")))
    assert not list(upward("open_mythos.model.", levels("files of `model`")))


def test_the_library_never_imports_what_uses_it():
    users = [
        f"{name} imports {module}"
        for file, name in NAMES.items()
        for module in imports(file)
        if module.split(".")[0] in OUTSIDE
    ]
    assert not users


def test_no_cycles():
    """Between modules of the package, imports inside functions included."""
    files = {name: file for file, name in NAMES.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' -> '.join((*path, name))}"
        if name in done or name not in files or files[name].name == "__init__.py":
            return
        for module in imports(files[name]):
            visit(module, (*path, name))
        done.add(name)

    for name in files:
        visit(name, ())


def test_light_modules():
    heavy = [
        f"{name} imports {module}"
        for name in LIGHT
        for module in imports(PACKAGE / f"{name}.py")
        if module.split(".")[0] not in {"open_mythos"} | STANDARD
    ]
    assert not heavy


def test_scripts_use_the_public_api_alone():
    private = [
        f"{file.relative_to(ROOT)} imports {module}"
        for top in sorted(OUTSIDE - {"tests"})
        for file in (ROOT / top).rglob("*.py")
        for module in imports(file)
        if module.startswith("open_mythos") and "._" in module
    ]
    assert not private
