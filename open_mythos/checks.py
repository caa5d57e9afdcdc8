"""Checks of arguments, choices and configuration fields (this module loads no torch).

The bounds of a configuration field are declared with the field, by :func:`within` and
:func:`one_of`, and checked by :func:`check_fields`.
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import field, fields
from functools import cache
from types import UnionType
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

from open_mythos.errors import ConfigError

T = TypeVar("T")

MAX_LOOPS = 1 << 14
"""Most loops of a call: a mistyped depth is refused at once instead of running for ever."""
COLDEST = 1e-4
"""Lowest sampling temperature above 0; below it logit differences would be lost to rounding."""


def whole(value: Any) -> int | None:
    """Return ``value`` as an integer, or None if it is not one (a bool is not)."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def plain(value: Any) -> Any:
    """Return numpy's numbers and arrays as Python's; other values unchanged."""
    return value.tolist() if type(value).__module__ == "numpy" else value


def is_int(value: Any) -> bool:
    """Return whether ``value`` is a Python integer (a bool is not)."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_scalar(value: Any) -> bool:
    """Return whether ``value`` is an int or a float, NaN included (a bool is not)."""
    return isinstance(value, float) or is_int(value)


def is_number(value: Any) -> bool:
    """Return whether ``value`` is an int or float that is finite as a float (a bool is not)."""
    try:
        return is_scalar(value) and math.isfinite(value)
    except OverflowError:
        return False


def check_count(where: str, value: Any, least: int = 1) -> int:
    """Return ``value`` as an integer.

    Raises:
        ConfigError: It is not an integer of at least ``least``.
    """
    count = whole(value)
    if count is None or count < least:
        raise _out_of_range(where, value, f"an integer >= {least}")
    return count


def check_number(where: str, value: Any, **bounds: float) -> None:
    """Check that ``value`` is within ``bounds`` (ge, gt, le, lt).

    Raises:
        ConfigError: It is not, or no finite number.
    """
    if not (is_number(value) and _in_bounds(value, bounds)):
        raise _out_of_range(where, value, _allowed(frozenset({float}), bounds))


def _out_of_range(where: str, value: Any, allowed: str) -> ConfigError:
    return ConfigError(
        f"{where} is out of range", where=where, value=value, allowed=allowed,
        fix=f"correct the argument {where}",
    )  # fmt: skip


def pick(table: Collection[str], name: Any, where: str, *, what: str = "", fix: str = "") -> Any:
    """Return the entry ``name`` of ``table``, or ``name`` itself if ``table`` holds plain names.

    Args:
        table: The allowed names, with or without values.
        name: The requested one.
        where: The field or argument that names it.
        what: What is chosen, for the message; ``where`` by default.
        fix: What to do about an unknown name; by default the nearest known name.

    Raises:
        ConfigError: ``name`` is not in ``table``; the message lists all names.
    """
    if not isinstance(name, str) or name not in table:
        raise ConfigError(
            f"unknown {what or where}", where=where, value=name, allowed=", ".join(table),
            fix=fix or nearest(str(name), table),
        )  # fmt: skip
    return table[name] if isinstance(table, Mapping) else name


def nearest(key: str, known: Iterable[str]) -> str:
    """Return ``"did you mean X?"`` for a misspelt key, or the list of the known ones."""
    known = list(known)
    match = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"known: {', '.join(sorted(known))}"


def unknown_key(key: str, known: Collection[str], where: str) -> ConfigError:
    """Return the error for a key that the configuration ``where`` does not have."""
    return ConfigError(
        "unknown key", where=where, value=key, allowed=f"the {len(known)} fields of {where}",
        fix=nearest(str(key), known),
    )  # fmt: skip


def within(default: T, **bounds: float) -> T:
    """Declare a numeric field with bounds (ge, gt, le, lt): ``lr: float = within(1e-3, gt=0)``."""
    return field(default=default, metadata={"bounds": bounds})


def one_of(default: str, choices: Sequence[str]) -> str:
    """Declare a string field that takes one of ``choices``."""
    return field(default=default, metadata={"choices": tuple(choices)})


def check_fields(section: str, config: Any) -> None:
    """Check every boolean, integer, float and choice field of a dataclass.

    Args:
        section: Prefix of the field names in messages; "" for none.
        config: An instance of a dataclass whose fields were declared by :func:`within` and
            :func:`one_of`, or without bounds.

    Raises:
        ConfigError: A value has another type, is not finite, or is out of bounds.
    """
    kinds_of = _kinds(config.__class__)
    for each in fields(config):
        kinds, value = kinds_of[each.name], plain(getattr(config, each.name))
        object.__setattr__(config, each.name, value)
        choices = each.metadata.get("choices") or ((True, False) if kinds == {bool} else ())
        if choices:
            if value not in choices or type(value) is not type(choices[0]):
                reject(section, config, each.name, " or ".join(map(repr, choices)))
        elif kinds <= {int, float, type(None)} and not (value is None and type(None) in kinds):
            bounds = each.metadata.get("bounds", {})
            right_kind = is_number if float in kinds else is_int
            if not (right_kind(value) and _in_bounds(value, bounds)):
                reject(section, config, each.name, _allowed(kinds, bounds))


def reject(section: str, config: Any, name: str, allowed: str) -> NoReturn:
    """Raise the ConfigError of field ``name``."""
    raise ConfigError(
        f"{name} is out of range", where=f"{section}.{name}" if section else name,
        value=getattr(config, name), allowed=allowed, fix=f"correct {name} in the configuration",
    )  # fmt: skip


@cache
def _kinds(cls: Any) -> dict[str, frozenset[Any]]:
    """Return field -> its type, or the members of its union."""
    return {
        name: frozenset(get_args(hint) if isinstance(hint, UnionType) else (hint,))
        for name, hint in get_type_hints(cls).items()
    }


_COMPARE = {
    "ge": (">=", operator.ge), "gt": (">", operator.gt),
    "le": ("<=", operator.le), "lt": ("<", operator.lt),
}  # fmt: skip


def _in_bounds(value: float, bounds: Mapping[str, float]) -> bool:
    return all(_COMPARE[name][1](value, bound) for name, bound in bounds.items())


def _allowed(kinds: frozenset[Any], bounds: Mapping[str, float]) -> str:
    kind = "a finite number" if float in kinds else "an integer"
    limits = " and ".join(f"{_COMPARE[name][0]} {bound}" for name, bound in bounds.items())
    return f"{kind} {limits}".strip() + (", or None" if type(None) in kinds else "")
