"""The notebook runs from top to bottom, and what it shows is so."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from doc_blocks import ROOT

NOTEBOOK = ROOT / "examples" / "loop_dynamics.ipynb"
HOPS = 4
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


@pytest.fixture(scope="module")
def results() -> dict:
    """The names that the notebook's cells leave behind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    namespace: dict = {"__name__": "notebook"}
    for number, cell in enumerate(CELLS):
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            exec(compile(source, f"{NOTEBOOK.name}, cell {number}", "exec"), namespace)
    namespace["figures"] = len(plt.get_fignums())
    plt.close("all")
    return namespace


def test_cells_compile_and_their_imports_exist():
    """The slow tests run every cell; this one notices a name that the library has lost."""
    for number, cell in enumerate(CELLS):
        if cell["cell_type"] == "code":
            tree = ast.parse("".join(cell["source"]))
            tree.body = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
            exec(compile(tree, f"{NOTEBOOK.name}, cell {number}", "exec"), {})


def test_nothing_but_source_is_kept():
    """Outputs would grow stale; a cell without an id is no valid notebook any more."""
    assert all(cell["id"] and cell["source"] for cell in CELLS)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in CELLS)


def test_links_lead_somewhere():
    text = "".join(line for cell in CELLS for line in cell["source"])
    assert "../docs/dynamics.md" in text
    assert Path(NOTEBOOK.parent / "../docs/dynamics.md").resolve().is_file()


@pytest.mark.slow
def test_more_loops_answer_more(results):
    accuracy = results["accuracy"]
    assert accuracy[0] + 0.15 < max(accuracy[3:])
    assert max(accuracy[3:]) > 0.75


@pytest.mark.slow
def test_the_blocks_have_the_spectral_radius_of_the_whole(results):
    """Two ways to one number: decomposed diagonal blocks, and matvecs of the whole Jacobian.

    That the fitted rate of a path is this number is tested on models of known spectra in
    ``tests/dynamics``; here both depend on what was learned.
    """
    whole = results["jacobian"].eigenvalues(2, max_matvecs=120).radius
    assert whole == pytest.approx(results["slowest"][-1], rel=0.02)
    assert 0.2 < results["slowest"][-1] < 1
    assert all(0.2 < rate < 1 for rate in results["fit"].rate[results["row"]].tolist())


@pytest.mark.slow
def test_the_long_run(results):
    counts, tokens = results["counts"], 64 * (HOPS + 1)
    assert sum(counts.values()) == tokens
    assert counts["converged"] > 0.7 * tokens


@pytest.mark.slow
def test_routing(results):
    routing = results["routing"]
    divergence = np.array(routing.divergence)
    assert divergence.shape == (2 * HOPS, 2 * HOPS)
    assert not divergence.diagonal().any()
    assert divergence.max() > 0


@pytest.mark.slow
def test_answers_appear_as_loops_go_on(results):
    """In what a probe finds and in what the model says; and later hops appear later."""
    scores, said = results["scores"], results["said"]
    assert len(scores) == 7
    assert abs(scores[0].selectivity) < 0.2  # the first state is zero: there is nothing to find
    assert scores[6].selectivity > scores[1].selectivity + 0.1
    assert (said[-1, -1] > said[0, -1] + 0.15).item()
    gain = (said[-1] - said[0]).tolist()
    assert max(gain[:2]) < gain[-1]


@pytest.mark.slow
def test_pictures(results):
    assert results["figures"] == 5
