"""Which way imports flow, read from the source without running it."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "open_mythos"
FILES = sorted(PACKAGE.rglob("*.py"))

# a module may import from its own line and from the lines above it
STREET = (
    ("errors", "lazy"),
    ("config", "files", "seeding", "distributed"),
    ("variants", "devices", "inference.cuda_graphs"),
    ("ops",),
    ("model.cache",),
    ("model.context", "model.trace"),
    ("model.init", "model.layers"),
    ("model.exit_rules",),
    ("model.active",),
    ("model.recurrent", "model.causal_lm"),
    ("inference.static_decoder",),
    ("model.generation",),
    ("model.mythos",),
    ("model.dense",),
)
RANK = {name: rank for rank, names in enumerate(STREET) for name in names}
OUTSIDE = {"benchmarks", "experiments", "examples", "tests", "training"}


def part(module: str) -> str:
    """The part that a module belongs to: ``open_mythos.model.layers.gqa`` -> ``model``."""
    pieces = module.split(".")[1:]
    return ".".join(pieces[: 2 if pieces[:1] in (["model"], ["inference"]) else 1])


@cache
def imports(file: Path) -> tuple[str, ...]:
    """Every module that a file imports, wherever in the file."""
    found: list[str] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module
            found.append(node.module)
            if node.module == "open_mythos":
                found += [f"open_mythos.{alias.name}" for alias in node.names]
    return tuple(found)


def own_part(file: Path) -> str:
    return part(".".join(("open_mythos", *file.relative_to(PACKAGE).with_suffix("").parts)))


CORE = [file for file in FILES if own_part(file) in RANK]


def test_the_street_names_real_parts():
    assert {own_part(file) for file in CORE} == set(RANK)


@pytest.mark.parametrize("file", CORE, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_core_imports_flow_one_way(file):
    for module in imports(file):
        if module.split(".")[0] == "open_mythos":
            target = part(module)
            assert target in RANK, f"the core must not import {module}"
            assert RANK[target] <= RANK[own_part(file)], f"{module} comes later"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_the_library_never_imports_what_uses_it(file):
    tops = {module.split(".")[0] for module in imports(file)}
    assert not tops & OUTSIDE


def test_no_cycles():
    """Between modules of the core, imports inside functions included."""
    names = {
        "open_mythos." + ".".join(file.relative_to(PACKAGE).with_suffix("").parts): file
        for file in CORE
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' -> '.join((*path, name))}"
        if name in done or name not in names:
            return
        for module in imports(names[name]):
            visit(module, (*path, name))
        done.add(name)

    for name in names:
        visit(name, ())
    assert len(done) == len(names)


@pytest.mark.parametrize("name", ["errors", "config", "variants"])
def test_light_modules(name):
    allowed = {"open_mythos"}
    for module in imports(PACKAGE / f"{name}.py"):
        assert module.split(".")[0] in allowed | STANDARD, module


STANDARD = {
    "__future__", "collections", "dataclasses", "difflib", "math", "operator", "typing",
}  # fmt: skip


def test_recipes_use_the_public_api_alone():
    """Scripts outside the library take names from the package, or from its main parts."""
    scripts = [file for top in OUTSIDE - {"tests"} for file in (ROOT / top).rglob("*.py")]
    for file in scripts:
        for module in imports(file):
            private = any(piece.startswith("_") for piece in module.split("."))
            assert not (private and module.startswith("open_mythos"))
