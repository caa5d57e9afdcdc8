"""Servers of a toy model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.inference.server.fake_host import FakeHost
from tests.inference.server.running import Running


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """Start servers that end with the test."""
    running: list[Running] = []

    def begin(host: FakeHost | None = None, **parts: Any) -> Running:
        running.append(Running(host or FakeHost(), **parts))
        return running[-1]

    yield begin
    for each in running:
        each.end()


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    """One server for all tests of a module that leave it as it is."""
    server = Running(FakeHost())
    yield server
    server.end()
