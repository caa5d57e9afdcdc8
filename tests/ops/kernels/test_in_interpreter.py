"""Runs the interpreted tests of this folder in a process of their own; see ``conftest.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OLDEST = (3, 7)
"""Triton whose interpreter understands loops over NumPy 2.4's numbers."""


@pytest.mark.parametrize("only", ["small_cases or liger", pytest.param("", marks=pytest.mark.slow)])
def test_kernels_equal_their_references(only: str) -> None:
    triton = pytest.importorskip("triton", reason="kernels are tested where Triton is installed")
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
        pytest.skip(f"the interpreter of Triton {triton.__version__} is too old for NumPy 2.4")
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-k", only, "-p", "no:cacheprovider", str(HERE)],
        env={**own, "TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        cwd=HERE.parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout, run.stdout
