"""Typed errors with one format: what is wrong, where, the value, what is allowed, and the fix.

The command line maps each class to its exit code.
"""

from __future__ import annotations

from typing import Any

_ABSENT = object()


class MythosError(Exception):
    """Base of all errors that the library raises deliberately.

    Args:
        what: What is wrong, in one sentence.
        where: The field, argument, file or call.
        value: The offending value, shown with ``repr`` (cut at 200 characters).
        allowed: What is accepted.
        fix: What the user can do about it.
    """

    exit_code = 1

    def __init__(
        self, what: str, *, where: str = "", value: Any = _ABSENT, allowed: str = "", fix: str = ""
    ) -> None:
        self.what, self.where, self.allowed, self.fix = what, where, allowed, fix
        self.value = None if value is _ABSENT else value
        shown = "" if value is _ABSENT else repr(value)
        shown = shown if len(shown) <= 200 else shown[:197] + "..."
        parts = {"where:": where, "value:": shown, "allowed:": allowed, "to do:": fix}
        lines = [f"  {name:8} {text}" for name, text in parts.items() if text]
        super().__init__("\n".join([what, *lines]))


class ConfigError(MythosError, ValueError):
    """An invalid configuration field or argument."""

    exit_code = 2


class DataError(MythosError, ValueError):
    """Input data or a file that is missing, corrupted or of the wrong format."""

    exit_code = 3


class EnvironmentError_(MythosError, RuntimeError):
    """A failure outside the program: missing package, no network, no disk space, no device."""

    exit_code = 4


class InternalError(MythosError, RuntimeError):
    """A violated invariant of the library: please report it."""

    exit_code = 5
