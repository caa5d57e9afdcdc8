"""The traced step of the real model against the mirror in ghost tensors, and the recorded runs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from open_mythos.plan import Layout, memory
from open_mythos.plan.trace import trace_step

from .plan_page import RESULTS
from .small import job_of, small_job

WITHIN = 0.03
CPU_SCRATCH = ("Muon",)
"""A CPU converts the operands of a sum of several dtypes inside of the kernel, where no tracker
looks; the plan of a GPU has no such sum."""
SMALL_LAYOUTS = (
    Layout(1, "none", micro_batch=8),
    Layout(1, "none", checkpoint_loops=True, micro_batch=8),
    Layout(8, "ddp", micro_batch=8),
    Layout(8, "fsdp", 8, micro_batch=8),
    Layout(8, "fsdp", 4, 2, True, micro_batch=8),
)
"""With so many tokens that the gradients of experts are not deferred."""


@pytest.mark.parametrize("layout", SMALL_LAYOUTS, ids=lambda layout: layout.name[:30])
def test_small_layouts_agree_with_the_mirror(layout: Layout) -> None:
    job = small_job(4, context=256)
    peaks = trace_step(job, layout, "cpu").peaks
    found = max(sum(parts.values()) for parts in peaks.values())
    assert found == pytest.approx(memory(job, layout, cuda=False).total, rel=WITHIN)


def test_a_large_layout_agrees_with_the_mirror() -> None:
    job, layout = job_of("3b"), Layout(64, "fsdp", 64, 4)
    shallow = replace(job, n_loops=3, max_loops=3)
    deep = trace_step(shallow, layout).at_depth(job.max_loops - 3)
    found = max(sum(parts.values()) for parts in deep.peaks.values())
    assert found == pytest.approx(memory(job, layout).total, rel=WITHIN)


def test_recorded_runs_agree_with_the_trace() -> None:
    for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]:
        if row["name"] not in CPU_SCRATCH:
            assert row["traced"] == pytest.approx(row["measured"], rel=WITHIN), row["name"]
