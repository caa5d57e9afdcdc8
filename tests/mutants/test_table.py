"""The table of mutants is about the present code, and the runner tells what is noticed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter
from functools import cache

import pytest

from mutants.table import ROOT, Mutant, mutants

LEAST, LEAST_RUN = 120, 90


@cache
def defined(path: str) -> set[str]:
    """Names of the classes and functions of a file of tests."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    kinds = (ast.ClassDef, ast.FunctionDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


def test_every_mutant_changes_one_place_and_names_its_tests():
    found = mutants()
    assert len(found) >= LEAST
    names = Counter((each.area, each.name) for each in found)
    assert not [name for name, count in names.items() if count > 1]
    sources = {each.place: (ROOT / each.place).read_text(encoding="utf-8") for each in found}
    for each in found:
        changed = each.changed(sources[each.place])
        assert changed != sources[each.place]
        compile(changed, each.place, "exec")
        assert each.tests, each.name
        for test in each.tests:
            path, *parts = test.split("::")
            assert {part.partition("[")[0] for part in parts} <= defined(path), test


def test_the_page_is_about_them():
    page = (ROOT / "docs" / "mutants.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if "`open_mythos/" in line]
    known = {(each.name, f"`{each.place}`") for each in mutants()}
    assert {(row[0][2:], row[1]) for row in rows} <= known
    assert len(rows) >= LEAST_RUN
    assert {row[-1] for row in rows} == {"killed |"}


CODE = "def double(x):\n    return 2 * x\n"
TESTS = (
    "import time\n"
    "from open_mythos.a import double\n"
    "def test_double(): assert double(3) == 6\n"
    "def test_kind(): assert isinstance(double(3), int)\n"
    "def test_ends(): time.sleep(60 * (double(2) == 5))\n"
)
PROGRAM = """
import sys
from pathlib import Path
from mutants.runner import run
from mutants.table import Mutant

for now, test in (("3 * x", "double"), ("3 * x", "kind"), ("5", "ends"), ("3 * x", "absent")):
    mutant = Mutant("area", "name", "a.py", "2 * x", now, (f"tests/test_a.py::test_{test}",))
    limit = 2.0 if test == "ends" else 50.0  # it sleeps for a minute, the others end
    print(*(each.verdict for each in run(Path(sys.argv[1]), [mutant], limit)))
"""


def test_verdicts(tmp_path):
    copy = tmp_path / "copy"
    files = {"open_mythos/__init__.py": "", "open_mythos/a.py": CODE, "tests/test_a.py": TESTS}
    for place, text in files.items():
        (copy / place).parent.mkdir(parents=True, exist_ok=True)
        (copy / place).write_text(text)
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(copy)], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )  # fmt: skip
    assert ran.stdout.split() == ["killed", "survived", "timeout", "error"]
    assert (copy / "open_mythos" / "a.py").read_text() == CODE


def test_a_text_that_is_not_there_is_an_error():
    mutant = Mutant("area", "name", "a.py", "3 * x", "x", ("tests/test_a.py",))
    for source in (CODE, "3 * x + 3 * x"):
        with pytest.raises(ValueError, match=r"places in open_mythos/a\.py hold"):
            mutant.changed(source)
