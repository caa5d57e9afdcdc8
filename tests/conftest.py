"""Settings of all tests, and the models that many of them read."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable
from functools import cache

import pytest
import torch
from helpers import ATTENTION_TYPES, small_model
from hypothesis import settings

from open_mythos import OpenMythos

# the same cases on every run and every machine: a failure is never a matter of luck
settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repeatable")


def pytest_configure() -> None:
    """Undo what a shell set for a background job: ignored signals would be inherited.

    What is imported and collected stays to the end: to search it for garbage took a sixth of the
    time of all tests.
    """
    gc.set_threshold(100_000, 20, 20)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def pytest_collection_finish() -> None:
    """Search for garbage among what the tests make, and less often than Python does."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def pytest_unconfigure() -> None:
    """Let the interpreter clear all at its end: Triton reports what is left."""
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` without a CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Every test begins with the same global generator, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(params=ATTENTION_TYPES)
def attn_type(request: pytest.FixtureRequest) -> str:
    """Both attention types, one after the other."""
    return request.param


@pytest.fixture(scope="session")
def shared_model() -> Callable[[str], OpenMythos]:
    """The randomised model of an attention type, made once; never to be changed by a test."""
    return cache(small_model)


@pytest.fixture
def model(attn_type: str, shared_model: Callable[[str], OpenMythos]) -> OpenMythos:
    """The randomised model of both attention types; never to be changed by a test."""
    return shared_model(attn_type)
