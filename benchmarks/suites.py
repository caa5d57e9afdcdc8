"""The suites there are, which of them a device runs, and for how long."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any, Protocol, cast

from benchmarks.models import Scale

CPU = (
    "experts", "training", "loops", "prefill", "decoding", "context", "batch", "exits", "quantized",
    "compiled", "start", "cache",
)  # fmt: skip
"""What `make bench` runs."""
CUDA = {
    "pretraining": 150.0, "serving": 80.0, "experts": 40.0, "decoding": 40.0, "training": 50.0,
    "kernels": 20.0, "loops": 30.0, "batch": 15.0, "context": 20.0, "prefill": 15.0,
    "compiled": 20.0,
}  # fmt: skip
"""What `make bench-gpu` runs, the important ones first, and the seconds each may take. What one
leaves over, those after it have."""
MODULES = {"cache": "caches"}
"""Suites whose module has another name."""
OPTIONAL = ("quantized", "compiled")
"""Suites that are skipped where their module is missing."""


class Suite(Protocol):
    """A module that measures."""

    def title(self, scale: Scale) -> str:
        """What the rows have in common."""
        ...

    def rows(self, scale: Scale) -> Iterator[Any]:
        """One object for every figure: :class:`benchmarks.measure.Row` or a relative of it."""
        ...


def names() -> tuple[str, ...]:
    """All suites that are there."""
    every = dict.fromkeys((*CPU, *CUDA))
    return tuple(name for name in every if name not in OPTIONAL or _exists(name))


def suite(name: str) -> Suite:
    """The module of a suite."""
    return cast(Suite, importlib.import_module(f"benchmarks.{MODULES.get(name, name)}"))


def of_device(kind: str) -> dict[str, float]:
    """Suite -> seconds allowed, in the order in which a device of this kind runs them."""
    chosen = CUDA if kind == "cuda" else dict.fromkeys(CPU, float("inf"))
    there = names()
    return {name: seconds for name, seconds in chosen.items() if name in there}


def _exists(name: str) -> bool:
    return importlib.util.find_spec(f"benchmarks.{name}") is not None
