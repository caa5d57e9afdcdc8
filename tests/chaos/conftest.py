"""Fixtures of the harness, and its table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from chaos import small_run
from chaos.fork_client import Forks
from chaos.lifetimes import Reference, reference
from chaos.outcome_table import Recorder, Row

_RECORDER = "chaos-recorder"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos-json", metavar="FILE", help="write the table of failures to FILE")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.has_plugin(_RECORDER):
        config.pluginmanager.register(Recorder(), _RECORDER)


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """As in the forks: sums are then added in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Row:
    """The test's line of the table."""
    found = request.config.pluginmanager.get_plugin(_RECORDER).row_of(request.node)
    assert found is not None, "give the test the mark `goal`"
    return found


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """The fork server; it leaves with the session."""
    with Forks(tmp_path_factory.mktemp("forks")) as server:
        yield server


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared folder that all runs train on; never to be changed by a test."""
    return small_run.make_data(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture(scope="session")
def straight(forks: Forks, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The run to which nothing happened."""
    return reference(forks, data, tmp_path_factory.mktemp("straight"))
