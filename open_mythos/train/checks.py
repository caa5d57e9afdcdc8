"""Bounds of configuration fields: declared with the field, checked by :func:`check_fields`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import field, fields
from functools import cache
from types import UnionType
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

from open_mythos.errors import ConfigError

T = TypeVar("T")


def within(
    default: T,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> T:
    """Declare a numeric field with bounds: ``lr: float = within(1e-3, gt=0)``."""
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    given = {name: value for name, value in bounds.items() if value is not None}
    return field(default=default, metadata={"bounds": given})


def one_of(default: str, choices: Sequence[str]) -> str:
    """Declare a string field that takes one of ``choices``."""
    return field(default=default, metadata={"choices": tuple(choices)})


def check_fields(section: str, config: Any) -> None:
    """Check every boolean, integer, float and choice field of a dataclass.

    Args:
        section: Prefix of the field names in messages; "" for none.
        config: An instance of a dataclass whose fields were declared by :func:`within` and
            :func:`one_of`, or plainly, which means without bounds.

    Raises:
        ConfigError: A value has another type, is not finite, or is out of bounds.
    """
    kinds_of = _kinds(config.__class__)
    for each in fields(config):
        kinds, value = kinds_of[each.name], getattr(config, each.name)
        if "choices" in each.metadata:
            choices = each.metadata["choices"]
            if value not in choices:
                reject(section, config, each.name, " or ".join(map(repr, choices)))
        elif bool in kinds:
            if not isinstance(value, bool):
                reject(section, config, each.name, "True or False")
        elif kinds <= {int, float, type(None)}:
            bounds = each.metadata.get("bounds", {})
            if value is None and type(None) in kinds:
                continue
            if not _is_number(value, float in kinds) or not _holds(value, bounds):
                reject(section, config, each.name, _allowed(kinds, bounds))


def reject(section: str, config: Any, name: str, allowed: str) -> NoReturn:
    """Raise the ConfigError of field ``name``."""
    raise ConfigError(
        f"{name} is out of range", where=f"{section}.{name}" if section else name,
        value=getattr(config, name), allowed=allowed,
    )  # fmt: skip


def is_int(value: Any) -> bool:
    """Whether ``value`` is an integer and not a boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


@cache
def _kinds(cls: Any) -> dict[str, frozenset[Any]]:
    """Return field -> its type, or the members of its union."""
    return {
        name: frozenset(get_args(hint) if isinstance(hint, UnionType) else (hint,))
        for name, hint in get_type_hints(cls).items()
    }


def _is_number(value: Any, floats: bool) -> bool:
    return is_int(value) or (floats and isinstance(value, float) and math.isfinite(value))


def _holds(value: float, bounds: dict[str, float]) -> bool:
    low, above = bounds.get("ge", -math.inf), bounds.get("gt", -math.inf)
    high, below = bounds.get("le", math.inf), bounds.get("lt", math.inf)
    return low <= value <= high and (above < value < below)


def _allowed(kinds: frozenset[Any], bounds: dict[str, float]) -> str:
    """Say in words which values are accepted."""
    low, above, high, below = (bounds.get(name) for name in ("ge", "gt", "le", "lt"))
    least = f">= {low}" if low is not None else f"> {above}" if above is not None else ""
    if high is not None or below is not None:
        first = f"{low} <= " if low is not None else f"{above} < "
        text = f"{first}x <= {high}" if high is not None else f"{first}x < {below}"
    else:
        text = f"finite and {least}" if float in kinds else f"an integer {least}"
    return text + (", or None" if type(None) in kinds else "")
