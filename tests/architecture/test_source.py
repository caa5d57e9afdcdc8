"""Rules of the house that can be read off the source."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from open_mythos import MythosConfig

PACKAGE = Path(__file__).parents[2] / "open_mythos"
FILES = sorted(PACKAGE.rglob("*.py"))
MODEL_FILES = [
    *(
        PACKAGE / "model" / name
        for name in ("causal_lm.py", "dense.py", "mythos.py", "recurrent.py")
    ),
    *sorted((PACKAGE / "model" / "layers").glob("*.py")),
]
files = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
MOST_LINES = 420


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def attributes(node: ast.AST) -> Iterator[str]:
    return (inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute))


@files
def test_files_are_short(file):
    assert len(file.read_text().splitlines()) <= MOST_LINES


def public_definitions(file: Path) -> Iterator[tuple[str, ast.AST]]:
    """Functions and classes of a module, and methods of its public classes.

    The attributes of a protocol are described by the protocol.
    """
    for node in tree(file).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            members = node.body if isinstance(node, ast.ClassDef) and not is_protocol(node) else ()
            for inner in members:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner


def is_protocol(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)


@files
def test_everything_public_is_documented(file):
    assert ast.get_docstring(tree(file)), "the module has no docstring"
    bare = [name for name, node in public_definitions(file) if not ast.get_docstring(node)]
    assert not bare


@files
def test_no_relative_paths_of_a_machine(file):
    text = file.read_text()
    for place in ("/home/", "/root/", "/work/", "/tmp/"):
        assert place not in text


def test_every_config_field_is_read():
    """A field that nothing reads outside its own module is a promise that nothing keeps."""
    own = tree(PACKAGE / "config.py")
    derived = {
        node.name: set(attributes(node))
        for node in ast.walk(own)
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("validate")
    }
    read = {name for file in MODEL_FILES for name in attributes(tree(file))}
    read |= {name for file in ("cache.py", "generation.py")
             for name in attributes(tree(PACKAGE / "model" / file))}  # fmt: skip
    while more := {name for used in read & derived.keys() for name in derived[used]} - read:
        read |= more
    fields = {field.name for field in dataclasses.fields(MythosConfig)}
    assert fields <= read, fields - read


def test_environment_variables_are_read_in_two_places():
    """The launcher's are read in ``distributed``; the switches of the hub's own tools in
    ``tokenizer/hub.py``, which must work without torch."""
    readers = {file for file in FILES if {"environ", "getenv"} & set(attributes(tree(file)))}
    assert readers <= {PACKAGE / "distributed.py", PACKAGE / "tokenizer" / "hub.py"}


def test_one_loop_body():
    """Blocks of the loop are applied in ``RecurrentBlock.step`` and nowhere else."""
    uses = []
    for file in FILES:
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.FunctionDef):
                loops = [n.iter for n in ast.walk(node) if isinstance(n, ast.For)]
                uses += [(file.name, node.name) for it in loops if "blocks" in set(attributes(it))]
    assert sorted(set(uses)) == [("dense.py", "body"), ("recurrent.py", "step")]


def test_diagnostics_are_no_module_attributes():
    """Modules are assigned to in their constructors alone: a forward pass leaves nothing behind."""
    late = []
    for file in MODEL_FILES:
        for function in ast.walk(tree(file)):
            if not isinstance(function, ast.FunctionDef) or function.name == "__init__":
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    late.append((file.name, function.name))
    bookkeeping = {("recurrent.py", "retire"), ("recurrent.py", "stop")}  # of a plain object
    assert set(late) - bookkeeping == {("moe.py", "update_bias")}


def test_no_global_statements():
    for file in FILES:
        assert not any(isinstance(node, ast.Global) for node in ast.walk(tree(file))), file
