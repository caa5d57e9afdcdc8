"""Checks on the fields of a configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from open_mythos.errors import ConfigError


def is_int(value: Any) -> bool:
    """An integer, and no boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


class Check:
    """Checks on the fields of one section; each raises ConfigError."""

    def __init__(self, section: str, config: Any) -> None:
        self._prefix, self._config = f"{section}." if section else "", config

    def refuse(self, name: str, allowed: str) -> None:
        """Raise the error of this field."""
        raise ConfigError(
            f"{name} is out of range", where=self._prefix + name,
            value=getattr(self._config, name), allowed=allowed,
        )  # fmt: skip

    def integer(self, name: str, least: int, allowed: str = "", optional: bool = False) -> None:
        """An integer >= ``least``."""
        value = getattr(self._config, name)
        if value is None and optional:
            return
        if not is_int(value) or value < least:
            self.refuse(
                name, allowed or f"an integer >= {least}" + (", or None" if optional else "")
            )

    def number(self, name: str, holds: Callable[[float], bool], allowed: str) -> None:
        """A finite number of which ``holds``."""
        value = getattr(self._config, name)
        is_number = isinstance(value, float) or is_int(value)
        if not is_number or not math.isfinite(value) or not holds(value):
            self.refuse(name, allowed)

    def choice(self, name: str, allowed: tuple[str, ...]) -> None:
        """One of ``allowed``."""
        if getattr(self._config, name) not in allowed:
            self.refuse(name, " or ".join(repr(each) for each in allowed))

    def boolean(self, name: str) -> None:
        """True or False."""
        if not isinstance(getattr(self._config, name), bool):
            self.refuse(name, "True or False")
