"""Values that a parameter or field must refuse, made from its annotation and its bounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np

NAN, INF = float("nan"), float("inf")
HUGE = 10**400
WRONG: dict[str, Any] = {
    "None": None, "text": "many", "empty text": "", "bytes": b"3", "half": 1.5, "nan": NAN,
    "inf": INF, "true": True, "empty list": [], "list": ["x", 1.5], "mapping": {"x": 1},
    "huge": HUGE, "beyond float32": 1e39, "complex": 1j, "object": object(),
    "array": np.zeros((2, 2)),
    "numpy nan": np.float64(NAN), "numpy half": np.float32(1.5), "numpy true": np.bool_(True),
    "zero byte": "a\0b", "long text": "x" * 5000,
}  # fmt: skip
FITS: dict[Any, set[str]] = {
    int: set(),
    float: {"half", "numpy half"},
    bool: {"true", "numpy true"},
    str: {"text", "empty text", "zero byte", "long text"},
    NoneType: {"None"},
    Path: {"text"},
}
"""Kind -> the values above that are of it, whether or not they mean anything."""
CONTAINERS = {"empty list", "list"}


def bad_values(hint: Any, bounds: Mapping[str, float] | None = None) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of what a parameter with this annotation must refuse."""
    kinds = _members(hint)
    if not kinds:
        return
    good = set().union(*(FITS.get(kind, set()) for kind in kinds))
    if Path in kinds:
        good -= {"zero byte", "long text"}
    for name, value in WRONG.items():
        if name not in good and not _of_a_container(name, hint):
            yield name, value
    yield from _outside(kinds, bounds or {})


def _members(hint: Any) -> set[Any]:
    """Return the plain kinds of an annotation; {} if anything fits."""
    if get_origin(hint) in (Union, UnionType):
        return set().union(*(_members(each) for each in get_args(hint)))
    if get_origin(hint) is Literal:
        return {Literal}
    if hint is Any or hint is object or not (isinstance(hint, type) or get_origin(hint)):
        return {NoneType} if hint is None else set()
    return {hint}


def _of_a_container(name: str, hint: Any) -> bool:
    """Whether a list, a mapping or an array may be what the annotation asks for."""
    text = str(hint)
    sequence = any(word in text for word in ("Sequence", "list", "Iterable", "tuple", "Tensor"))
    if name in CONTAINERS:
        return sequence and name == "empty list"
    if name == "mapping":
        return "Mapping" in text or "dict" in text or "Iterable" in text
    return name == "array" and ("Iterable" in text or "object" in text)


def _outside(kinds: set[Any], bounds: Mapping[str, float]) -> Iterator[tuple[str, Any]]:
    if not kinds & {int, float}:
        return
    for name, bound in bounds.items():
        step = {"ge": -1, "gt": 0, "le": 1, "lt": 0}[name]
        yield f"beyond {name} {bound}", bound + step
    if "ge" not in bounds and "gt" not in bounds:
        yield "far below", -(10**30) if int in kinds else -1e30
    if int in kinds and float not in kinds:
        yield "far above", 10**30
