"""Planned memory against real training steps, and its dependence on job and layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.plan_memory import Case, cases, distributed_cases, main, row, row_of_processes
from open_mythos.accounting import account
from open_mythos.errors import ConfigError
from open_mythos.model.layers import moe
from open_mythos.plan import Layout, layouts, memory
from open_mythos.plan.memory import (
    activations_per_loop,
    cached_trace,
    counted_bytes,
    held_bytes,
    local_elements,
)
from open_mythos.plan.trace import trace_step
from open_mythos.plan.tracker import Part, dry_run

from .small import DENSE_FFN, SMALL, WITHIN, check, job_of, small_job

ONE = Layout(1, "none")
QUICK = (
    "gqa, experts, bfloat16, last 2 loops",
    "gqa, dense, float32, checkpointed",
    "Muon, GQA, dense",
)
UNUSUAL = Case(
    "unusual fields", loops=2, dtype="bfloat16",
    model=(
        ("attn_type", "gqa"), ("qk_norm", "head_after_rope"), ("qkv_bias", True),
        ("injection", "concat"), ("injection_bias", True), ("block_norms", "in+sum"),
        ("recurrent_layers", 2), ("prelude_layers", 0), ("lora_rank", 0), ("readout", False),
        ("initial_state", "normal"), ("tie_embeddings", True), ("logit_softcap", 30.0),
    ),
)  # fmt: skip
"""Config fields that the plan does not mention: it follows the model."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Kernels allocate scratch memory for every thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def total(job, layout: Layout) -> int:
    return memory(job, layout).total


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(each, id=each.name, marks=() if each.name in QUICK else pytest.mark.slow)
        for each in cases()
    ]
    + [pytest.param(UNUSUAL, id=UNUSUAL.name)],
)
def test_planned_memory_matches_a_real_step(case: Case) -> None:
    found = row(case)
    check(found)
    assert found.held == pytest.approx(found.held_planned, rel=0.001)


@pytest.mark.slow
@pytest.mark.parametrize("case", distributed_cases(), ids=lambda case: case.name)
def test_planned_memory_matches_real_distributed_steps(case: Case) -> None:
    check(row_of_processes(case))


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--out", str(tmp_path / "none.json")])
    assert "worst error" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_comparison_detects_extra_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    job, plain = small_job(2, model={"attn_type": "gqa"}), moe.MoEFFN.route
    four = replace(ONE, micro_batch=4)
    before = total(job, four)

    def wasteful(self, x_ND):
        self.waste = [*getattr(self, "waste", []), x_ND.repeat(4, 1)]
        return plain(self, x_ND)

    monkeypatch.setattr(moe.MoEFFN, "route", wasteful)
    cached_trace.cache_clear()
    try:
        assert total(job, four) > (1 + WITHIN) * before
    finally:
        cached_trace.cache_clear()


@pytest.mark.parametrize(
    ("job", "layout"),
    [
        (small_job(5), Layout(4, "fsdp", 4, 2)),
        (small_job(6, grad_loops=4, model=DENSE_FFN), replace(ONE, checkpoint_loops=True)),
    ],
    ids=["FSDP", "truncated"],
)
@pytest.mark.slow
def test_extrapolation_from_few_loops(job, layout: Layout) -> None:
    deep = max(sum(parts.values()) for parts in trace_step(job, layout).peaks.values())
    assert memory(job, layout, exact=False).total == pytest.approx(deep, rel=0.005)


@pytest.mark.slow
def test_what_saves_activations() -> None:
    job, four = small_job(3, model=DENSE_FFN), replace(ONE, micro_batch=4)
    plain = total(job, four)
    assert total(job, replace(four, checkpoint_loops=True)) < plain
    assert total(replace(job, grad_loops=1), four) < plain
    assert (
        total(job, replace(ONE, micro_batch=2)) < plain < total(replace(job, dtype="float32"), four)
    )
    kept = activations_per_loop(job)
    assert kept["kept"] > 5 * kept["checkpointed"] > 0
    assert kept["checkpointed"] == pytest.approx(4 * job.cfg.dim, rel=0.01)  # the state alone


def test_bytes_by_purpose() -> None:
    job = small_job(2)
    n, copies = account(job.cfg).parameters, Part.COPIES.value
    ddp, fsdp = memory(job, Layout(4, "ddp")), memory(job, Layout(4, "fsdp", 4))
    assert ddp.parts["weights"] == pytest.approx(4 * n, rel=0.001)
    assert ddp.parts["gradients"] >= 4 * (n - job.cfg.dim - 1)
    assert fsdp.parts["weights"] < 0.3 * ddp.parts["weights"]
    assert "gathered weights" in fsdp.parts.keys() - ddp.parts.keys()
    assert copies in ddp.parts
    assert copies not in memory(small_job(2, dtype="float32"), ONE).parts
    assert ddp.total == sum(ddp.parts.values())
    assert ddp.phase == "backward"
    # expert parallelism: experts of other ranks are not gathered
    apart = Layout(4, "fsdp", 4, 4)
    assert memory(job, apart).parts["gathered weights"] < fsdp.parts["gathered weights"]
    experts = [each for each in job.parameters if each.expert]
    assert [local_elements(each, apart) for each in experts] == [each.n // 4 for each in experts]


@pytest.mark.slow
def test_the_peak_may_be_in_the_optimizer_step() -> None:
    found = memory(small_job(1, context=1, optimizer="muon", model={"n_experts": 64}), ONE)
    assert found.phase == "optimizer"
    assert found.parts["optimizer's update"] > 0


@pytest.mark.parametrize("gpus", [1, 4])
@pytest.mark.slow
def test_the_counted_bound_is_a_lower_bound(gpus: int) -> None:
    job = small_job(1)
    for way in list(layouts(job, gpus))[::5]:
        assert counted_bytes(job, way) <= (1 + WITHIN / 10) * total(job, way), way


@pytest.mark.slow
def test_more_processes_never_need_more() -> None:
    job = small_job(1, context=8)
    assert total(job, Layout(2, "fsdp", 2, 2)) >= total(job, Layout(8, "fsdp", 8, 8))


def test_dense_models() -> None:
    six, seven = (memory(small_job(1, model=DENSE_FFN, n_layers=n), ONE) for n in (6, 7))
    assert six.parts["weights"] == 4 * account(SMALL, n_layers=6).parameters
    assert seven.total > six.total


@pytest.mark.parametrize("name", ["1b", "1t"])
def test_held_bytes_follow_the_parameter_counts(name: str) -> None:
    counts, gate = account(job_of(name).cfg).parameters, job_of(name).cfg.dim + 1
    assert held_bytes(job_of(name), ONE) == 4 * counts + 8 * (counts - gate)
    assert held_bytes(job_of(name, ema=True), ONE) == 4 * counts + 12 * (counts - gate)
    assert held_bytes(job_of(name, optimizer="muon"), ONE) < 4 * counts + 8 * (counts - gate)


def test_a_dry_run_rejects_an_initialized_process_group() -> None:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(ConfigError, match="process"), dry_run(1, "cuda"):
            pass
    finally:
        dist.destroy_process_group()
