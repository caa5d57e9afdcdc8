"""What the plan says a step needs, against real training steps; and how it changes with the job."""

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
    _step,
    activations_per_loop,
    counted_bytes,
    estimate,
    held_bytes,
    local_elements,
)
from open_mythos.plan.trace import trace_step
from open_mythos.plan.tracker import Part, dry_run

from .small import SMALL, WITHIN, check, job_of, small_job

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
"""Fields that nothing in the plan names: it follows the model."""


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
    "case", [*(case for case in cases() if case.name in QUICK), UNUSUAL], ids=lambda case: case.name
)
def test_a_real_step_needs_what_is_planned(case: Case) -> None:
    found = row(case)
    check(found)
    assert found.held == pytest.approx(found.held_planned, rel=0.001)


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that allocates more in the plan than in the real step is noticed."""
    case = next(case for case in cases() if case.name == "gqa, experts, float32, kept")
    real = row(case)
    plain = moe.MoEFFN.route

    def wasteful(self, x_ND):
        self.waste = [*getattr(self, "waste", []), x_ND.repeat(4, 1)]
        return plain(self, x_ND)

    monkeypatch.setattr(moe.MoEFFN, "route", wasteful)
    _step.cache_clear()
    try:
        wrong = replace(real, planned=memory(*_job_and_layout(), kernels="cpu").total)
        with pytest.raises(AssertionError):
            check(wrong)
    finally:
        _step.cache_clear()


def _job_and_layout():
    job = small_job(4, model={"attn_type": "gqa"}, context=64, dtype="float32")
    return job, replace(ONE, micro_batch=4)


def test_the_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--out", str(tmp_path / "none.json")])
    assert "worst error" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_every_kind_of_step(case: Case) -> None:
    check(row(case))


@pytest.mark.slow
@pytest.mark.parametrize("case", distributed_cases(), ids=lambda case: case.name)
def test_steps_of_several_processes(case: Case) -> None:
    check(row_of_processes(case))


@pytest.mark.parametrize(
    ("job", "layout"),
    [
        (small_job(5), Layout(4, "fsdp", 4, 2)),
        (small_job(6, grad_loops=4, model={"n_experts": 0}), replace(ONE, checkpoint_loops=True)),
    ],
    ids=["FSDP", "truncated"],
)
def test_a_few_loops_tell_about_many(job, layout: Layout) -> None:
    deep = max(sum(parts.values()) for parts in trace_step(job, layout).peaks.values())
    assert estimate(job, layout).total == pytest.approx(deep, rel=0.005)


@pytest.mark.parametrize("layout", [ONE, Layout(4, "ddp"), Layout(6, "fsdp", 3, 2)])
def test_what_is_held_is_what_is_counted(layout: Layout) -> None:
    job = small_job(1, optimizer="muon" if layout.kind == "fsdp" else "adamw", ema=True)
    held = trace_step(job, layout).held
    held[Part.GRADIENTS.value] = 0  # the buckets of DDP
    assert sum(held.values()) == pytest.approx(held_bytes(job, layout), rel=0.002)


def test_each_loop_costs_what_it_keeps() -> None:
    job = small_job(model={"n_experts": 0})
    kept = activations_per_loop(job)
    assert kept["kept"] > 5 * kept["checkpointed"] > 0
    assert kept["checkpointed"] == pytest.approx(4 * job.cfg.dim, rel=0.01)  # the state alone
    deep, deeper = (memory(small_job(n, model={"n_experts": 0}), ONE).total for n in (6, 7))
    assert deeper - deep == pytest.approx(job.context * kept["kept"])


def test_what_saves_activations() -> None:
    four = replace(ONE, micro_batch=4)
    job = small_job(4, model={"n_experts": 0})
    plain = total(job, four)
    assert total(job, replace(four, checkpoint_loops=True)) < plain
    assert total(replace(job, grad_loops=2), four) < plain
    assert total(job, replace(ONE, micro_batch=2)) < plain
    assert total(replace(job, dtype="float32"), four) > plain
    assert total(replace(job, dtype="float16"), four) == pytest.approx(plain, rel=0.001)


def test_where_the_bytes_of_each_kind_are() -> None:
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


def test_experts_of_other_processes_are_not_gathered() -> None:
    job = small_job(2)
    whole, apart = Layout(8, "fsdp", 8), Layout(8, "fsdp", 8, 8)
    gathered = [memory(job, each).parts["gathered weights"] for each in (whole, apart)]
    assert gathered[1] < gathered[0]
    experts = [each for each in job.parameters if each.expert]
    assert [local_elements(each, apart) for each in experts] == [each.n // 8 for each in experts]


def test_the_optimizer_may_be_the_worst_moment() -> None:
    found = memory(small_job(1, context=1, optimizer="muon", model={"n_experts": 64}), ONE)
    assert found.moment == "optimizer"
    assert found.parts["optimizer's update"] > 0
    assert memory(small_job(), replace(ONE, micro_batch=8)).moment == "backward"


@pytest.mark.parametrize("gpus", [1, 4])
def test_the_counted_bound_is_one(gpus: int) -> None:
    job = small_job(1)
    for way in list(layouts(job, gpus))[::5]:
        assert counted_bytes(job, way) <= (1 + WITHIN / 10) * total(job, way), way


def test_more_processes_never_need_more() -> None:
    job = small_job(1, context=8)
    needs = [total(job, Layout(gpus, "fsdp", gpus, gpus)) for gpus in (2, 4, 8)]
    assert needs == sorted(needs, reverse=True)


def test_dense_models() -> None:
    six, seven = (
        memory(small_job(1, model={"n_experts": 0}, n_layers=layers), ONE) for layers in (6, 7)
    )
    assert six.parts["weights"] == 4 * account(SMALL, n_layers=6).parameters
    assert seven.total > six.total


@pytest.mark.parametrize("name", ["1b", "1t"])
def test_totals_are_those_of_the_accounting(name: str) -> None:
    counts, gate = account(job_of(name).cfg).parameters, job_of(name).cfg.dim + 1
    assert held_bytes(job_of(name), ONE) == 4 * counts + 8 * (counts - gate)
    assert held_bytes(job_of(name, ema=True), ONE) == 4 * counts + 12 * (counts - gate)
    assert held_bytes(job_of(name, optimizer="muon"), ONE) < 4 * counts + 8 * (counts - gate)


def test_a_dry_run_needs_a_process_of_its_own() -> None:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(ConfigError, match="process"), dry_run(1, "cuda"):
            pass
    finally:
        dist.destroy_process_group()
