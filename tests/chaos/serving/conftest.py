"""A model that all servers serve, and one server that most tests leave as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.serving.server import Server, make_model, serving

QUEUED = 64
"""Requests that may wait: few, so that an overload is reached soon."""


@pytest.fixture(scope="session")
def served_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the model."""
    return make_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def _shared_server(
    served_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("shared")
    with serving(served_model, folder, "--limits", f'{{"queued_requests": {QUEUED}}}') as server:
        yield server


@pytest.fixture
def server(_shared_server: Server) -> Iterator[Server]:
    """A server; after the test its books balance, and the canary is what it was."""
    before = _shared_server.canary()
    yield _shared_server
    _shared_server.check_books()
    assert _shared_server.canary() == before
