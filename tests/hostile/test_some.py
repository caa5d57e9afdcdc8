"""A small part of ``make hostile``."""

from __future__ import annotations

import os

import pytest

from tests.hostile.base import FILES, make
from tests.hostile.cases import cases, run_case, some
from tests.hostile.kinds import NAMES

QUICK = ("pickle", "link to a file outside", "alias bomb", "values: escapes")
"""Hostilities that the fast tests try, once each."""


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    before = os.getcwd()
    os.chdir(folder)
    make(folder)
    os.chdir(before)
    return folder


def test_nothing_is_executed_written_or_raised(good, tmp_path):
    troubles = []
    for i, (file, name, command) in enumerate(some(10**9)):
        if name in QUICK:
            work = tmp_path / str(i)
            work.mkdir()
            result = run_case(good, work, file, name, command)
            if result.trouble:
                troubles.append(f"{file.path}, {name}: {command}: {result.trouble}")
    assert not troubles


def test_a_command_that_does_harm_is_seen(good, tmp_path):
    """Control: a file that is fine, and a command that writes outside of its folder."""
    nothing = FILES[0]
    NAMES["control"] = frozenset(), lambda file, canary: None
    try:
        (tmp_path / "a").mkdir()
        fine = run_case(good, tmp_path / "a", nothing, "control", "info run")
        (tmp_path / "b").mkdir()
        harm = run_case(
            good, tmp_path / "b", nothing, "control", "report run --out ../outside/page.html"
        )
    finally:
        del NAMES["control"]
    assert (fine.code, fine.trouble) == (0, "")
    assert "writes outside" in harm.trouble


def test_there_are_enough():
    assert len(list(cases())) > 600
    assert {name for _, name, _ in some(10**9)} == set(NAMES) > set(QUICK)
