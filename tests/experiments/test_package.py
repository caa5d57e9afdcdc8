"""The experiments stand outside the library and use its public modules only."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_public_names_only():
    """No module of the command line, nothing with a leading underscore."""
    found = []
    for file in sorted((ROOT / "experiments").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            ours = [name for name in names if name.startswith("open_mythos")]
            found += [
                f"{file.relative_to(ROOT)}: {name}" for name in ours
                if "._" in name or name.startswith("open_mythos.cli")
            ]  # fmt: skip
    assert not found


def test_the_wheel_holds_the_library_alone():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["open_mythos"]}


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom experiments.__main__ import build_parser\n"
        "build_parser().format_help()\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
