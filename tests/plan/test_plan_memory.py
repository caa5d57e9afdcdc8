"""What the plan says a step needs, against real training steps; and how it changes with the job."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.plan_memory import (
    Case,
    cases,
    distributed_cases,
    main,
    row,
    row_of_processes,
)
from open_mythos.accounting import account
from open_mythos.errors import ConfigError
from open_mythos.plan import Layout, layouts, memory
from open_mythos.plan.forward import Model
from open_mythos.plan.memory import (
    _forward_bytes,
    _held_parts,
    _step_peak,
    activations_per_loop,
    held_parts,
    least_bytes,
    local_elements,
    step_peak,
)
from open_mythos.plan.ops import Ops
from open_mythos.plan.parameters import parameters
from open_mythos.plan.tape import ACTIVATIONS, COPIES, GATHERED, GRADIENTS
from open_mythos.variants import VARIANTS, variant

from .small import SMALL, TOLERANCE, check, job_of, small_job

QUICK = (
    "mla, experts, float32, kept",
    "mla, experts, bfloat16, checkpointed",
    "gqa, experts, bfloat16, last 2 loops",
    "gqa, dense, float32, checkpointed",
    "1 sequence of 32",
    "many tokens for each expert",
    "micro-batches",
    "Muon",
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Kernels take scratch memory for every thread they have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def forget() -> None:
    """What has been planned before."""
    for planned in (_held_parts, _forward_bytes, _step_peak):
        planned.cache_clear()


def named(name: str) -> Case:
    return next(case for case in cases() if case.name == name)


def total(job, layout: Layout) -> int:
    return memory(job, layout).total


@pytest.mark.parametrize("name", QUICK)
def test_a_real_step_needs_what_is_planned(name: str) -> None:
    found = row(named(name))
    check(named(name), found)
    assert found.held == pytest.approx(found.held_planned, rel=0.001)


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that saves less than the real one does is noticed."""
    monkeypatch.setattr(Ops, "rms_norm", lambda self, x, weight: self.copy(x))
    forget()
    try:
        assert row(named("gqa, dense, float32, kept")).error < -TOLERANCE
    finally:
        forget()


def test_the_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--out", str(tmp_path / "none.json")])
    assert "worst error" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_every_kind_of_step(case: Case) -> None:
    check(case, row(case), of_step=2)


@pytest.mark.slow
@pytest.mark.parametrize("case", distributed_cases(), ids=lambda case: case.name)
def test_steps_of_several_processes(case: Case) -> None:
    check(case, row_of_processes(case), of_step=None)


@pytest.mark.parametrize("name", VARIANTS)
def test_totals_are_those_of_the_accounting(name: str) -> None:
    alone = Layout(1, "none")
    counts, gate = account(variant(name)), variant(name).dim + 1
    held = held_parts(job_of(name), alone)
    assert held == {"weights": 4 * counts.parameters, "moments": 8 * (counts.parameters - gate)}
    ema = held_parts(job_of(name, ema=True), alone)
    assert ema["averaged weights"] == 4 * (counts.parameters - gate)
    muon = held_parts(job_of(name, optimizer="muon"), alone)["moments"]
    assert held["moments"] / 2 < muon < held["moments"]


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_more_loops_never_need_less(attn_type: str, checkpoint: bool) -> None:
    """But for gradients that wait: how much does so at the peak goes up and down."""
    layout, before = Layout(1, "none", checkpoint_loops=checkpoint), 0
    for loops in range(1, 9):
        job = small_job(loops, model={"attn_type": attn_type})
        here = total(job, layout)
        assert here >= 0.99 * before
        if not checkpoint and loops > 1:
            assert here > before
        before = max(here, before)


def test_each_loop_costs_what_it_leaves_behind() -> None:
    job = small_job(model={"n_experts": 0})
    kept = activations_per_loop(job)
    assert kept["kept"] > 5 * kept["checkpointed"] > 0
    assert kept["checkpointed"] == 4 * job.cfg.dim  # the state alone
    assert kept["without gradient"] == 0
    layout = Layout(1, "none")
    deep, deeper = (step_peak(small_job(n, model={"n_experts": 0}), layout) for n in (6, 7))
    grown = deeper[ACTIVATIONS] - deep[ACTIVATIONS]
    assert grown == job.context * kept["kept"]


def test_what_saves_activations() -> None:
    plain = total(small_job(8), Layout(1, "none", micro_batch=4))
    assert total(small_job(8), Layout(1, "none", micro_batch=4, checkpoint_loops=True)) < plain
    assert total(small_job(8, grad_loops=2), Layout(1, "none", micro_batch=4)) < plain
    assert total(small_job(8), Layout(1, "none", micro_batch=2)) < plain
    assert total(small_job(8, dtype="float32"), Layout(1, "none", micro_batch=4)) > plain
    assert total(small_job(8, dtype="float16"), Layout(1, "none", micro_batch=4)) == plain


def test_what_waits_for_gradients_of_experts_is_bounded() -> None:
    """One more loop of a checkpointed step adds one state, with experts as without."""
    layout, job = Layout(1, "none", checkpoint_loops=True, micro_batch=2), small_job()
    peaks = [step_peak(small_job(loops), layout)[ACTIVATIONS] for loops in (2, 32, 64)]
    state = 2 * job.context * 4 * job.cfg.dim
    assert (peaks[1] - peaks[0]) / 30 < 3 * state
    assert (peaks[2] - peaks[1]) / 32 == pytest.approx(state, rel=0.02)


def test_where_the_bytes_of_each_kind_are() -> None:
    job = small_job(2)
    ddp, fsdp = memory(job, Layout(4, "ddp")), memory(job, Layout(4, "fsdp", 4))
    assert ddp.parts["weights"] == 4 * account(job.cfg).parameters
    assert ddp.parts[GRADIENTS] >= 4 * (account(job.cfg).parameters - job.cfg.dim - 1)
    assert fsdp.parts["weights"] < 0.3 * ddp.parts["weights"]
    assert GATHERED in fsdp.parts
    assert GATHERED not in ddp.parts
    assert COPIES in ddp.parts
    assert COPIES not in memory(small_job(2, dtype="float32"), Layout(1, "none")).parts
    assert ddp.total == sum(ddp.parts.values())


def test_divided_experts_are_not_gathered() -> None:
    job = small_job(2)
    whole, apart = Layout(8, "fsdp", 8), Layout(8, "fsdp", 8, 8)
    assert memory(job, apart).parts[GATHERED] < memory(job, whole).parts[GATHERED]
    experts = [each for each in parameters(job.cfg) if each.expert]
    assert [local_elements(each, apart) for each in experts] == [each.n // 8 for each in experts]
    model = Model(job.cfg, shard=8, experts=8)
    gathered = sum(len(unit.weights) for unit in model.sharding.units.values())
    assert gathered == len(parameters(job.cfg)) - len(experts)


def test_the_optimizer_may_be_the_worst_moment() -> None:
    job = small_job(1, context=1, optimizer="muon", model={"n_experts": 64})
    found = memory(job, Layout(1, "none"))
    assert found.moment == "optimizer"
    assert found.parts["optimizer's update"] > 0
    assert memory(small_job(), Layout(1, "none", micro_batch=8)).moment == "backward"


@settings(max_examples=25)
@given(st.data())
def test_more_processes_never_need_more(data: st.DataObject) -> None:
    """Of all layouts the most frugal, at a fixed global batch: doubling the processes helps, or at
    least does not hurt."""
    model = data.draw(
        st.fixed_dictionaries(
            {
                "attn_type": st.sampled_from(["mla", "gqa"]),
                "n_experts": st.sampled_from([0, 4, 6, 8]),
                "dim": st.sampled_from([32, 48, 64]),
                "vocab_size": st.sampled_from([61, 320]),
                "tie_embeddings": st.booleans(),
            }
        )
    )
    loops, dtype = data.draw(st.integers(1, 3)), data.draw(st.sampled_from(["float32", "bfloat16"]))
    job = small_job(loops, model=model, dtype=dtype, context=8)
    before = None
    for gpus in (2, 4, 8):
        ways = layouts(job, gpus)
        here = min(total(job, way) for way in ways if way.kind != "ddp")
        assert before is None or here <= before
        before = here


@pytest.mark.parametrize("name", ["1b", "10b", "1t"])
def test_parts_of_weights_only_shrink(name: str) -> None:
    job = job_of(name)
    sizes = [
        sum(held_parts(job, Layout(gpus, "fsdp", gpus)).values())
        for gpus in (2**k for k in range(1, 13))
    ]
    assert sizes == sorted(sizes, reverse=True)


@settings(max_examples=30)
@given(
    st.sampled_from(["none", "ddp", "fsdp"]), st.sampled_from([1, 2, 4]), st.booleans(),
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 3),
)  # fmt: skip
def test_the_quick_bound_is_one(
    kind: str, experts: int, checkpoint: bool, loops: int, micro_batch: int, micro_batches: int
) -> None:
    layout = Layout(
        1 if kind == "none" else 4, kind, 4 if kind == "fsdp" else 1,
        experts if kind == "fsdp" else 1, checkpoint, micro_batch, micro_batches,
    )  # fmt: skip
    assert least_bytes(small_job(loops), layout) <= total(small_job(loops), layout)


def test_dense_models() -> None:
    counts = account(SMALL, n_layers=6)
    job = small_job(1, model={"n_experts": 0}, n_layers=6)
    found = memory(job, Layout(1, "none"))
    assert found.parts["weights"] == 4 * counts.parameters
    assert total(small_job(1, model={"n_experts": 0}, n_layers=7), Layout(1, "none")) > found.total


@pytest.mark.parametrize("field", ["attn_backend", "moe_backend"])
def test_plain_twins_are_not_planned_for(field: str) -> None:
    with pytest.raises(ConfigError, match="plain twin"):
        memory(small_job(model={field: "reference"}), Layout(1, "none"))
