"""The command line: ``open-mythos COMMAND ...``; ``open-mythos COMMAND --help`` explains each.

Parsing does not import torch, so help and usage errors appear immediately.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress

from open_mythos.errors import EnvironmentError_, InternalError, MythosError

DEBUG = "--debug"
"""Option of every command: show the traceback of an error."""
_NO_MEMORY = ("out of memory", "can't allocate memory", "memory allocation")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code of the process.

    0 on success; 2 to 5 for a :class:`~open_mythos.errors.MythosError`, printed to standard error;
    75 if training was interrupted and saved its state; 130 if interrupted otherwise. Any other
    exception becomes one of these errors; ``--debug`` shows its traceback.
    """
    from open_mythos.cli.parser import parse

    words = list(sys.argv[1:] if argv is None else argv)
    debug = DEBUG in words
    words = [word for word in words if word != DEBUG]
    _replace_unencodable()
    try:
        run, arguments = parse(words)
        code = run(**arguments)
        if sys.stdout is not None:  # it was closed before the start: `>&-`
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        # stdout was closed (`| head`): leave nothing for the interpreter to flush
        _discard_output()
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        typed = as_typed(error, words)
        if sys.stderr is not None:
            with suppress(OSError):  # a full disk must not change the exit code
                print(f"open-mythos: {typed}", file=sys.stderr)
        return typed.exit_code


def as_typed(error: Exception, words: Sequence[str] = ()) -> MythosError:
    """Return ``error`` itself if it is typed, else the typed error that describes it."""
    if isinstance(error, MythosError):
        return error
    where = f"open-mythos {' '.join(words[:1])}".strip()
    found = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
        return EnvironmentError_(
            "there is not enough memory", where=where, value=found,
            allowed="what this machine can hold", fix="use a smaller model, batch or length",
        )  # fmt: skip
    if isinstance(error, ModuleNotFoundError) and error.name:
        return _missing(error.name.partition(".")[0], where)
    if isinstance(error, OSError):
        return EnvironmentError_(
            "the system refused a file or a connection", where=str(error.filename or where),
            value=found, allowed="a file that can be read or written",
            fix="check path, permissions and free space",
        )  # fmt: skip
    return InternalError(
        "an unexpected error", where=where, value=found, allowed="none",
        fix=f"report it with what {DEBUG} shows",
    )  # fmt: skip


def _missing(module: str, where: str) -> EnvironmentError_:
    """Return the error of a package that is not installed, with the extra that brings it."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        needed = requires("open-mythos") or []
    except PackageNotFoundError:  # run from a folder
        needed = []
    name = module.replace("_", "-")
    extras = re.findall(rf"^{re.escape(name)}\b.*extra == ['\"](\w+)", "\n".join(needed), re.M)
    extras.sort(key=lambda extra: extra == "dev")  # which has all of them
    package = f"'open-mythos[{extras[0]}]'" if extras else name
    return EnvironmentError_(
        "a package is missing", where=where, value=module, allowed="an installation with it",
        fix=f"pip install {package}",
    )  # fmt: skip


def _replace_unencodable() -> None:
    """Let a console that lacks a character show "?" in its place instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", "") == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
