"""Registry of suites, and the time budget of each by device."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, Protocol, cast

from benchmarks.models import Scale

CPU = (
    "experts", "training", "loops", "prefill", "decoding", "context", "batch", "exits", "engine",
    "http", "quantized", "compiled", "start", "cache",
)  # fmt: skip
"""Suites of `make bench`."""
CUDA = {
    "pretraining": 150.0, "serving": 80.0, "experts": 40.0, "decoding": 40.0, "training": 50.0,
    "kernels": 20.0, "loops": 30.0, "batch": 15.0, "context": 20.0, "prefill": 15.0,
    "compiled": 20.0,
}  # fmt: skip
"""Suites of `make bench-gpu` by importance, with seconds; unused time goes to later ones."""
MODULES = {"cache": "caches", "http": "http_load"}
"""Suites whose module is named differently."""


class Suite(Protocol):
    """Interface of a suite's module."""

    def title(self, scale: Scale) -> str:
        """What the rows have in common."""
        ...

    def rows(self, scale: Scale) -> Iterator[Any]:
        """Yield one object per measurement: :class:`benchmarks.measure.Row` or similar."""
        ...


def names() -> tuple[str, ...]:
    """Return all suites."""
    return tuple(dict.fromkeys((*CPU, *CUDA)))


def suite(name: str) -> Suite:
    """Import the module of a suite."""
    return cast(Suite, importlib.import_module(f"benchmarks.{MODULES.get(name, name)}"))


def of_device(kind: str) -> dict[str, float]:
    """Return suite -> seconds allowed, in the order in which such a device runs them."""
    return CUDA if kind == "cuda" else dict.fromkeys(CPU, float("inf"))
