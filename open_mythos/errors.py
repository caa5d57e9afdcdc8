"""The errors that users meet: one format, five parts.

what happened, where, the value that caused it, what is allowed, and what to do about it.
The command line turns each class into its exit code.
"""

from __future__ import annotations

from typing import Any

_ABSENT = object()


class MythosError(Exception):
    """Base of every error the library raises on purpose.

    Args:
        what: One sentence: what is wrong.
        where: The field, argument, file or call it concerns.
        value: The offending value, shown with ``repr`` (cut at 200 characters).
        allowed: What would have been accepted.
        fix: What the reader can do about it.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        value: Any = _ABSENT,
        allowed: str = "",
        fix: str = "",
    ) -> None:
        self.what, self.where, self.allowed, self.fix = what, where, allowed, fix
        self.value = None if value is _ABSENT else value
        lines = [what]
        if where:
            lines.append(f"  where:   {where}")
        if value is not _ABSENT:
            shown = repr(value)
            lines.append(f"  value:   {shown if len(shown) <= 200 else shown[:197] + '...'}")
        if allowed:
            lines.append(f"  allowed: {allowed}")
        if fix:
            lines.append(f"  to do:   {fix}")
        super().__init__("\n".join(lines))


class ConfigError(MythosError, ValueError):
    """A configuration field or a call argument that cannot be honoured."""

    exit_code = 2


class DataError(MythosError, ValueError):
    """Input data or a file that is missing, damaged or of the wrong kind."""

    exit_code = 3


class EnvironmentError_(MythosError, RuntimeError):
    """Something outside the program: a missing package, no network, no space, no device."""

    exit_code = 4


class InternalError(MythosError, RuntimeError):
    """A broken invariant of the library itself: please report it."""

    exit_code = 5
