"""Checks of arguments, choices and configuration fields (this module loads no torch).

:func:`checked` compares the arguments of a function with its annotations.

The bounds of a configuration field are declared with the field, by :func:`within` and
:func:`one_of`, and checked by :func:`check_fields`.
"""

from __future__ import annotations

import builtins
import difflib
import inspect
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import field, fields
from functools import cache, wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NoReturn,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from open_mythos.errors import ConfigError

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")

MAX_LOOPS = 1 << 14
"""Most loops of a call: a mistyped depth is refused at once instead of running for ever."""
COLDEST = 1e-4
"""Lowest sampling temperature above 0; below it logit differences would be lost to rounding."""
MOST = (1 << 63) - 1
"""Largest integer of an argument: what a tensor or a file can hold."""
LARGEST = (2 - 2**-23) * 2.0**127
"""Largest number of an argument: what a float32 can hold, as PyTorch computes with it."""
MAX_PATH = 4096
"""Characters of the name of a file."""
_WORDS: dict[Any, str] = {
    int: "an integer", float: "a finite number", str: "a text", bool: "True or False",
    None: "None", NoneType: "None", Path: "a path",
}  # fmt: skip


def whole(value: Any) -> int | None:
    """Return ``value`` as an integer, or None if it is not one (a bool is not)."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def plain(value: Any) -> Any:
    """Return numpy's numbers and arrays as Python's; other values unchanged."""
    return value.tolist() if type(value).__module__ == "numpy" else value


def is_id(value: Any) -> bool:
    """Return whether ``value`` is an integer that can be a token id."""
    number = whole(value)
    return number is not None and 0 <= number <= MOST


def is_int(value: Any) -> bool:
    """Return whether ``value`` is a Python integer (a bool is not)."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_scalar(value: Any) -> bool:
    """Return whether ``value`` is an int or a float, NaN included (a bool is not)."""
    return isinstance(value, float) or is_int(value)


def is_number(value: Any) -> bool:
    """Return whether ``value`` is an int or float that is finite as a float32 (a bool is not)."""
    return is_scalar(value) and abs(value) <= LARGEST


def check_count(where: str, value: Any, least: int = 1) -> int:
    """Return ``value`` as an integer.

    Raises:
        ConfigError: It is not an integer of at least ``least``.
    """
    count = whole(value)
    if count is None or not least <= count <= MOST:
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
    """Check every field of a dataclass against its type, its bounds and its choices.

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
            right = is_number(value) if float in kinds else fits(value, int)
            if not (right and _in_bounds(value, bounds)):
                reject(section, config, each.name, _allowed(kinds, bounds))
        elif not any(fits(value, kind) for kind in kinds):
            reject(section, config, each.name, " or ".join(map(described, kinds)))


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


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse arguments that are not of the annotated kind, before ``function`` begins.

    Not for functions that are compiled or traced: their tensors are looked at by PyTorch.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        hints, bound = annotations_of(function), signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if name not in hints:
                continue
            if get_origin(hints[name]) or hints[name] in _SIMPLE:
                bound.arguments[name] = value = plain(value)
            if not fits(value, hints[name]):
                raise ConfigError(
                    f"{name} is of another kind", where=name, value=value,
                    allowed=described(hints[name]),
                    fix=f"correct the argument {name} of {function.__qualname__}",
                )  # fmt: skip
        return function(*bound.args, **bound.kwargs)

    return call


class _Names(dict[str, Any]):
    """Names of a module; one that is imported for type checkers alone stands for anything."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, Any)


@cache
def annotations_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return parameter -> annotation, without those that take several arguments."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    kept = {
        p.name for p in inspect.signature(function).parameters.values() if p.kind not in several
    }
    names = _Names(getattr(inspect.unwrap(function), "__globals__", {}))
    hints = get_type_hints(function, localns=names)
    return {name: hint for name, hint in hints.items() if name in kept}


def fits(value: Any, hint: Any) -> bool:
    """Return whether ``value`` is of the kind ``hint``; a kind that cannot be looked at fits."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fits(value, inner[0])
    if origin in (Union, UnionType):
        if Path in inner and isinstance(value, str):
            return _is_path(value)
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return any(value is each or (type(value) is type(each) and value == each) for each in inner)
    if hint in _SIMPLE:
        return _SIMPLE[hint](value)
    if isinstance(hint, TypeVar):
        return hint.__bound__ is None or fits(value, hint.__bound__)
    if origin is not None and isinstance(origin, type):
        return _fits_generic(value, origin, inner)
    if isinstance(hint, type) and hint is not Any:
        return _is_instance(value, hint)
    return True


def _is_path(value: str) -> bool:
    return "\0" not in value and 0 < len(value) < MAX_PATH


_SIMPLE: dict[Any, Callable[[Any], bool]] = {
    int: lambda value: (number := whole(value)) is not None and abs(number) <= MOST,
    float: lambda value: is_number(plain(value)),
    bool: lambda value: isinstance(plain(value), bool),
    str: lambda value: isinstance(value, str),
    None: lambda value: value is None,
    NoneType: lambda value: value is None,
    Path: lambda value: isinstance(value, Path) and _is_path(str(value)),
    object: lambda value: True,
}


def _fits_generic(value: Any, origin: type, inner: tuple[Any, ...]) -> bool:
    """Compare with a kind such as ``Sequence[int]``; what is consumed by a look is not entered."""
    value = plain(value)
    if isinstance(value, str | bytes) or not isinstance(value, origin):
        return False
    if issubclass(origin, Mapping) or not isinstance(value, list | tuple):
        return True
    if issubclass(origin, tuple) and Ellipsis not in inner:
        return len(value) == len(inner) and all(map(fits, value, inner))
    return not inner or all(fits(each, inner[0]) for each in value)


def _is_instance(value: Any, hint: type) -> bool:
    if getattr(hint, "_is_protocol", False):
        return all(hasattr(value, name) for name in _members(hint))
    value = getattr(value, "_orig_mod", value)  # of a compiled model
    return isinstance(value, hint)


@cache
def _members(protocol: type) -> frozenset[str]:
    """Return what an object of ``protocol`` has."""
    found: set[str] = set()
    for each in protocol.__mro__:
        if getattr(each, "_is_protocol", False) and each.__name__ not in ("Protocol", "Generic"):
            found |= {name for name in vars(each) if not name.startswith("_")}
            found |= set(getattr(each, "__annotations__", {})) | ({"__call__"} & set(vars(each)))
    return frozenset(found)


def described(hint: Any) -> str:
    """Return ``hint`` in words, for the part "allowed" of an error."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(described, inner)))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if hint in _WORDS:
        return _WORDS[hint]
    if origin is not None and isinstance(origin, type):
        of = f" of {described(inner[0])}" if inner and issubclass(origin, Iterable) else ""
        return f"{origin.__name__.lower()}{of}"
    name = str(getattr(hint, "__name__", hint))
    if getattr(hint, "_is_protocol", False):
        return f"{name}, which has {', '.join(sorted(_members(hint)))}"
    return name
