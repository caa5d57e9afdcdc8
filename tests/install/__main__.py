"""Build the package, install it in empty environments, run every command there.

    python -m tests.install            the base install, without extras, every command and the demo
    python -m tests.install matrix     also each other Python, and every dependency's lower bound

Prints a table, writes it as JSON, and exits with 1 if anything failed. Packages come from where pip
is configured to find them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

from tests.install.commands import ALL, MISSING, SHORT, Command

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.11", "3.12", "3.13")
COMMAND_SECONDS = 600


class Table:
    """The rows of the result, printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, where: str, what: str, trouble: str, seconds: float = 0.0) -> None:
        """Add a row; ``trouble`` is empty if all was well."""
        self.rows.append({"where": where, "what": what, "trouble": trouble, "seconds": seconds})
        print(f"{'FAILED' if trouble else 'ok':7}{where:14} {seconds:6.1f} s  {what}", flush=True)
        if trouble:
            print(f"       {trouble}", flush=True)


def run(words: list[str], cwd: Path, seconds: float = COMMAND_SECONDS) -> tuple[int, str]:
    """Run a program without the checkout on its path; return exit code and output."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    try:
        done = subprocess.run(
            words, cwd=cwd, env=clean, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 124, f"not at its end after {seconds:.0f} s"
    return done.returncode, done.stdout.decode(errors="replace")


def python_of(version: str) -> str:
    """Return an interpreter of ``version``, "" if there is none."""
    places = [shutil.which(f"python{version}") or ""]
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    places += map(str, sorted(root.glob(f"{version}.*/bin/python")))
    for place in filter(None, places):
        check = f"import sys, venv; sys.exit(sys.version_info[:2] != {_numbers(version)})"
        try:
            if subprocess.run([place, "-c", check], capture_output=True).returncode == 0:
                return place
        except OSError:
            continue
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def lower_bounds() -> list[str]:
    """Return the oldest allowed version of every dependency as pip's requirements."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [re.match(r"([\w\-\[\]]+)>=([\w.]+)", each) for each in project["dependencies"]]
    if not all(found):
        raise SystemExit(f"a dependency without a lower bound: {project['dependencies']}")
    return [f"{match[1]}=={match[2]}" for match in found if match]


def build(work: Path, table: Table) -> Path | None:
    """Build the sdist and, from it, the wheel; return the wheel."""
    tools, start = work / "tools", time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", str(tools)], check=True)
    pip = [str(tools / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "-q"]
    code, said = run([*pip, "install", "build"], work)
    if code == 0:
        code, said = run([str(tools / "bin" / "python"), "-m", "build", "-o", str(work / "dist"),
                          str(ROOT)], work)  # fmt: skip
    made = sorted(path.suffix for path in (work / "dist").glob("*"))
    trouble = "" if made == [".gz", ".whl"] else f"built {made}: {said[-600:]}"
    table.add("build", "sdist, and the wheel from it", trouble, time.monotonic() - start)
    return next((work / "dist").glob("*.whl"), None)


def install(folder: Path, python: str, packages: list[str], table: Table) -> str:
    """Make an environment with ``packages``; return its ``open-mythos``, "" if it failed."""
    start = time.monotonic()
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "-q"]
    code, said = run([*pip, "install", *packages], folder, 3600)
    errors = [line for line in said.splitlines() if "ERROR" in line]
    table.add(folder.name, "pip install", "" if code == 0 else " ".join(errors)[-600:],
              time.monotonic() - start)  # fmt: skip
    return str(folder / "bin" / "open-mythos") if code == 0 else ""


def texts(work: Path) -> Path:
    """Make a folder with text and an empty table, to run the commands in."""
    (work / "texts").mkdir(parents=True)
    (work / "tables").mkdir()
    (work / "tables" / "a.parquet").write_bytes(b"PAR1")
    for i in range(6):
        (work / "texts" / f"{i}.txt").write_text(f"def add(a, b):\n    return a + {i}\n" * 100)
    return work


def check(program: str, commands: tuple[Command, ...], work: Path, table: Table) -> None:
    """Run ``commands`` in ``work``."""
    where = work.name
    for command in commands:
        start = time.monotonic()
        code, said = run([program, *command.words.split()], work)
        trouble = ""
        if code != command.code:
            trouble = f"exit code {code}, not {command.code}: {said[-400:]}"
        elif command.prints not in said:
            trouble = f"does not print {command.prints!r}: {said[-400:]}"
        elif "Traceback" in said:
            trouble = f"a traceback: {said[-400:]}"
        table.add(where, f"open-mythos {command.words}".strip(), trouble, time.monotonic() - start)


def check_help(program: str, work: Path, table: Table) -> None:
    """Run ``--help`` of every command that the bare command lists."""
    _, listed = run([program], work)
    names = [line[2:16].strip() for line in listed.splitlines() if line.startswith("  ")]
    helps = tuple(Command(f"{name} --help", prints="usage: open-mythos") for name in names)
    if len(names) < 10:
        table.add(work.name, "list of commands", f"found {names}")
    check(program, helps, work, table)


def check_demo(python: Path, work: Path, table: Table) -> None:
    """Run the demo, which is in the checkout, with the installed package."""
    for name in ("experiments", "docs/demo"):
        shutil.copytree(ROOT / name, work / name, dirs_exist_ok=True)
    start = time.monotonic()
    words = [str(python), "-m", "experiments", "demo", "--quick", "--out", "demo"]
    code, said = run(words, work, 1800)
    missing = [name for name in ("report.html", "demo.png", "results.json")
               if not (work / "demo" / name).exists()]  # fmt: skip
    trouble = f"exit code {code}: {said[-600:]}" if code else ""
    trouble = trouble or (f"not written: {missing}" if missing else "")
    table.add(work.name, "python -m experiments demo --quick", trouble, time.monotonic() - start)


def base(work: Path, wheel: Path, table: Table) -> None:
    """Check the base install, without extras."""
    program = install(work / "base", sys.executable, [str(wheel)], table)
    if program:
        place = texts(work / "base-runs")
        check_help(program, place, table)
        check(program, (*ALL, *MISSING), place, table)
        check_demo(work / "base" / "bin" / "python", place, table)


def matrix(work: Path, wheel: Path, table: Table) -> None:
    """Check the other Pythons and the lower bounds."""
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    cases: dict[str, tuple[str, list[str]]] = {"lower-bounds": (sys.executable, lower_bounds())}
    for version in PYTHONS:
        if version != own:
            cases[f"python-{version}"] = python_of(version), []
    for name, (python, pins) in cases.items():
        if not python:
            table.add(name, "not on this machine", "")
            continue
        program = install(work / name, python, [*pins, str(wheel)], table)
        if program:
            check(program, SHORT, texts(work / f"{name}-runs"), table)
        shutil.rmtree(work / name)  # PyTorch is large


def main(argv: list[str]) -> int:
    """Run the checks; return the exit code."""
    table = Table()
    with tempfile.TemporaryDirectory(prefix="install-") as folder:
        work = Path(folder)
        wheel = build(work, table)
        if wheel is not None:
            base(work, wheel, table)
            if argv == ["matrix"]:
                matrix(work, wheel, table)
    failed = [row for row in table.rows if row["trouble"]]
    out = ROOT / "runs" / "install.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(table.rows, indent=1) + "\n", encoding="utf-8")
    print(f"{len(table.rows) - len(failed)} passed, {len(failed)} failed; {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
