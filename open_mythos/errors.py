"""Typed errors with one format: what is wrong, where, the value, what is allowed, and the fix.

The command line maps each class to its exit code.
"""

from __future__ import annotations

import unicodedata
from reprlib import Repr
from typing import Any

_ABSENT = object()
_MOST_CHARACTERS = 200
_TO_SHOW = Repr()
_TO_SHOW.maxstring = _TO_SHOW.maxother = _MOST_CHARACTERS
_TO_SHOW.maxlist = _TO_SHOW.maxtuple = _TO_SHOW.maxdict = _TO_SHOW.maxset = 40


def printable(text: str, keep: str = "") -> str:
    """Return ``text`` with control characters escaped as in ``repr``, except those in ``keep``.

    A terminal would obey them: names in files and the text of a model are not trusted.
    """
    return "".join(ascii(c)[1:-1] if _steers(c) and c not in keep else c for c in text)


def _steers(c: str) -> bool:
    return unicodedata.category(c) in _CONTROLS or unicodedata.bidirectional(c) in _DIRECTIONS


_CONTROLS = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode categories of control characters, lone surrogates and separators of lines."""
_DIRECTIONS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
"""Bidirectional classes of characters that show the following text in another order."""


def shown_value(value: Any) -> str:
    """Return ``repr(value)``, cut without building what is cut off."""
    try:
        text = _TO_SHOW.repr(value)
    except Exception:  # of an integer of thousands of digits, or of a faulty object
        text = f"<{type(value).__name__}>"
    text = printable(text)
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 3] + "..."


class MythosError(Exception):
    """Base of all errors that the library raises deliberately.

    Args:
        what: What is wrong, in one sentence.
        where: The field, argument, file or call.
        value: The offending value, shown with ``repr`` (cut at 200 characters).
        allowed: What is accepted.
        fix: What the user can do about it; by default the advice of the class.
    """

    exit_code = 1
    advice = "see the documentation of the call"
    """``fix`` of an error that names none."""

    def __init__(
        self, what: str, *, where: str = "", value: Any = _ABSENT, allowed: str = "", fix: str = ""
    ) -> None:
        self.what, self.where, self.allowed, self.fix = what, where, allowed, fix or self.advice
        self.value = None if value is _ABSENT else value
        shown = "" if value is _ABSENT else shown_value(value)
        parts = {"where:": where, "value:": shown, "allowed:": allowed, "to do:": self.fix}
        lines = [f"  {name:8} {printable(text)}" for name, text in parts.items() if text]
        super().__init__("\n".join([printable(what, keep="\n"), *lines]))

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), str(self), self.__dict__)


def _again(kind: type[MythosError], text: str, state: dict[str, Any]) -> MythosError:
    """Build a pickled error, whose text is complete already."""
    error = kind.__new__(kind, text)
    error.args = (text,)
    error.__dict__ |= state
    return error


class ConfigError(MythosError, ValueError):
    """An invalid configuration field or argument."""

    exit_code = 2
    advice = "correct the argument"


class DataError(MythosError, ValueError):
    """Input data or a file that is missing, corrupted or of the wrong format."""

    exit_code = 3
    advice = "restore the file, or name another one"


class EnvironmentError_(MythosError, RuntimeError):
    """A failure outside the program: missing package, no network, no disk space, no device."""

    exit_code = 4
    advice = "check disk, network and installed packages"


class InternalError(MythosError, RuntimeError):
    """A violated invariant of the library: please report it."""

    exit_code = 5
    advice = "report it, with the command and this message"
