"""Runs mutants one after the other in a copy of the project, and says which survive.

A survivor is a promise that no test holds. mutmut and cosmic-ray change every operator of a
package and run its tests for each change: thousands of mutants and days here, most of them about
messages and speed. This table aims at the guards and at the core instead, names for each mutant
the tests that are there for it, and takes minutes.

The packages that all tests import are loaded once; each mutant is a fork of that process.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from mutants.table import ROOT, Mutant

COPIED = (
    "open_mythos", "tests", "docs", "examples", "experiments", "training", "benchmarks",
    "pyproject.toml", "README.md", "CHANGELOG.md", "Makefile", "mkdocs.yml",
)  # fmt: skip
PRELOADED = (
    "torch", "torch._dynamo", "numpy", "hypothesis", "pytest", "safetensors.torch", "tokenizers",
    "transformers.modeling_utils", "transformers.generation.utils",
)  # fmt: skip
OPTIONS = (
    "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:schemathesis",
    "-W", "ignore::pytest.PytestAssertRewriteWarning",  # of packages that are loaded already
    "-m", "not slow and not chaos and not gpu and not network",
)  # fmt: skip
FAILED, WRONG_CALL, NOTHING_RUN = 1, 4, 5
"""Exit codes of pytest."""


@dataclass(frozen=True)
class Result:
    """How the tests of a mutant ended."""

    area: str
    name: str
    place: str
    tests: tuple[str, ...]
    verdict: str
    """"killed", "survived", "timeout", or "error": the tests could not be run."""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return asdict(self) | {"seconds": round(self.seconds, 1)}


@contextmanager
def copy_of_project(root: Path = ROOT) -> Iterator[Path]:
    """Yield a copy of the project, with compiled files and times: nothing is compiled again."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder) / "project"
        copy.mkdir()
        for name in COPIED:
            if (root / name).is_dir():
                shutil.copytree(root / name, copy / name)
            elif (root / name).exists():
                shutil.copy2(root / name, copy / name)
        yield copy


def preload() -> None:
    """Import what takes long and is not changed."""
    for name in PRELOADED:
        import_module(name)


def run_tests(copy: Path, tests: Sequence[str], limit: float) -> str:
    """Run tests in a fork of this process; return "passed" or a verdict."""
    log = copy.parent / "log"
    pid = os.fork()
    if pid == 0:
        _run_and_exit(copy, tests, log)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return _verdict(os.waitstatus_to_exitcode(status))
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "timeout"


def _run_and_exit(copy: Path, tests: Sequence[str], log: Path) -> None:
    code = WRONG_CALL
    try:
        os.setpgid(0, 0)
        output = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.chdir(copy)
        sys.path[:] = [str(copy), str(copy / "tests"), *(p for p in sys.path if not _ours(p))]
        for name in [n for n in sys.modules if n.partition(".")[0] in ("mutants", "open_mythos")]:
            del sys.modules[name]
        os.environ["PYTHONPATH"] = str(copy)
        import pytest

        code = int(pytest.main([*OPTIONS, *tests]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _ours(path: str) -> bool:
    return Path(path or ".").resolve() in (ROOT, ROOT / "tests")


def _verdict(code: int) -> str:
    if code == 0:
        return "passed"
    return "killed" if code == FAILED else "error"


@contextmanager
def applied(copy: Path, mutant: Mutant, number: int) -> Iterator[None]:
    """Change the copy for a while.

    The time of each change is another one, so that no compiled file of another is taken for it.
    """
    path = copy / mutant.place
    source, times = path.read_text(encoding="utf-8"), path.stat()
    changed = mutant.changed(source)
    compile(changed, mutant.place, "exec")
    try:
        path.write_text(changed, encoding="utf-8")
        os.utime(path, (times.st_atime, int(times.st_mtime) + 10 * (number + 1)))
        yield
    finally:
        path.write_text(source, encoding="utf-8")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def run(copy: Path, mutants: Sequence[Mutant], limit: float) -> Iterator[Result]:
    """Run the tests of each mutant, ``limit`` seconds at most."""
    for number, each in enumerate(mutants):
        start = time.monotonic()
        with applied(copy, each, number):
            verdict = run_tests(copy, each.tests, limit)
        verdict = "survived" if verdict == "passed" else verdict
        seconds = time.monotonic() - start
        yield Result(each.area, each.name, each.place, each.tests, verdict, seconds)


def unchanged(copy: Path, mutants: Sequence[Mutant], limit: float) -> str:
    """Run all tests without a change: one that fails anyway notices nothing."""
    tests = sorted({test for each in mutants for test in each.tests})
    return run_tests(copy, tests, limit)
