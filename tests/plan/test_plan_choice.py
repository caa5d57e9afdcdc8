"""The chosen layout, and the error if none fits."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import yaml

from open_mythos.errors import ConfigError
from open_mythos.plan import (
    GPUS,
    DoesNotFitError,
    Job,
    Layout,
    Wish,
    choose,
    gpu,
    layouts,
    make_plan,
    memory,
    parse_count,
    report,
)
from open_mythos.plan.choose import step_seconds
from open_mythos.plan.memory import Memory
from open_mythos.train.config import RunConfig
from open_mythos.variants import VARIANTS

from .small import DENSE_FFN, job_of, small_job

H100 = gpu("h100")


def with_memory(megabytes: float):
    """Return a GPU that small models can fill."""
    return replace(H100, memory=megabytes * 1e6 / 0.92)


@pytest.fixture
def simple_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace traced memory by a formula, so that a search over all layouts is quick."""

    def total(job: Job, layout: Layout) -> int:
        weights = 8 / (layout.shard if layout.kind == "fsdp" else 1) + 2 / layout.experts
        loops = 1 if layout.checkpoint_loops else job.max_loops
        return int(1e6 * (weights + 0.25 * layout.micro_batch * loops * job.context / 32))

    def needs(job: Job, layout: Layout, *, exact: bool = True) -> Memory:
        return Memory({"weights": total(job, layout)}, "backward")

    for name in ("counted_bytes", "likely_bytes"):
        monkeypatch.setattr(choose, name, total)
    for module in (choose, report):
        monkeypatch.setattr(module, "memory", needs)
    monkeypatch.setattr(report, "activations_per_loop", lambda job: {})


@pytest.mark.slow
def test_planned_memory_is_that_of_the_layout() -> None:
    wish = Wish(kind="ddp", checkpoint_loops=False)
    plan = make_plan(small_job(1), H100, 8, 1e9, batch_tokens=8 * 4 * 32, wish=wish)
    assert plan.memory == memory(plan.job, plan.layout)
    assert plan.memory.total <= plan.gpu.usable < plan.gpu.memory
    assert (plan.layout.gpus, plan.layout.micro_batch, plan.layout.global_batch) == (8, 4, 32)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("gpus", "gpu_name"), [(8, "h100"), (1024, "b200")])
def test_every_variant_has_an_answer(name: str, gpus: int, gpu_name: str) -> None:
    try:
        least, fits = make_plan(job_of(name), gpu(gpu_name), gpus, 1e9).memory, True
    except DoesNotFitError as error:
        least, fits = error.least, False
    assert (least.total <= gpu(gpu_name).usable) == fits


@pytest.mark.usefixtures("simple_memory")
def test_no_fitting_layout_is_much_faster() -> None:
    job, found = small_job(4), []
    for megabytes in (3, 4, 6, 12, 100):
        small = with_memory(megabytes)
        layout = choose.choose(job, small, 8, 4, 0.3)
        seconds = sum(step_seconds(job, H100, layout, 0.3))
        found.append((seconds, layout))
        assert choose.fits(job, small, layout)
        for way in layouts(job, 8):
            for size in (1, 2, 4):
                other = replace(way, micro_batch=size, micro_batches=4 // size)
                if way.shard in (1, 8) and choose.fits(job, small, other):
                    assert sum(step_seconds(job, H100, other, 0.3)) > seconds / 1.03
    assert all(fast[0] <= 1.03 * slow[0] for slow, fast in pairwise(found))
    assert found[0][1].kind == "fsdp"
    assert (found[-1][1].kind, found[-1][1].micro_batch) == ("ddp", 4)


@pytest.mark.usefixtures("simple_memory")
def test_fixed_fields_are_kept() -> None:
    job, large = small_job(4), with_memory(1000)
    wish = Wish(kind="fsdp", shard=4, experts=2, micro_batch=2, checkpoint_loops=True)
    assert wish.allows(choose.choose(job, large, 8, 4, 0.3, wish))
    for name, value in vars(wish).items():
        assert getattr(choose.choose(job, large, 8, 4, 0.3, Wish(**{name: value})), name) == value
    for impossible in (Wish(shard=3), Wish(kind="ddp", shard=8), Wish(micro_batch=3)):
        with pytest.raises(ConfigError, match="no such layout"):
            choose.choose(job, large, 8, 4, 0.3, impossible)


@pytest.mark.usefixtures("simple_memory")
def test_the_error_names_what_would_fit() -> None:
    job, small = small_job(4), with_memory(2.5)
    with pytest.raises(DoesNotFitError) as caught:
        choose.choose(job, small, 2, 1, 0.3)
    needed = caught.value.gpus_needed
    assert caught.value.exit_code == 2
    assert caught.value.least.total > small.usable
    assert needed is not None
    assert str(needed) in caught.value.fix
    assert choose.choose(job, small, needed, 1, 0.3).gpus == needed
    with pytest.raises(DoesNotFitError):
        choose.choose(job, small, needed // 2, 1, 0.3)
    with pytest.raises(DoesNotFitError) as caught:  # another layout of as many GPUs fits
        choose.choose(job, with_memory(4), 8, 1, 0.3, Wish(kind="ddp"))
    assert (caught.value.layout.kind, caught.value.gpus_needed) == ("ddp", 8)
    assert "leave more of the layout" in caught.value.fix
    long = small_job(4, context=2048, model={"max_seq_len": 2048})
    assert choose.context_that_fits(long, with_memory(6), 64, 1) == 512


def test_the_error_names_weights_that_no_number_of_gpus_splits() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        make_plan(small_job(1, context=4), with_memory(0.5), 8, 1e6)
    assert caught.value.gpus_needed is None
    assert "no number" in caught.value.fix
    assert max(caught.value.least.parts.items(), key=lambda part: part[1])[0] == "gathered weights"


def test_layouts() -> None:
    for gpus in (1, 6, 8):
        for way in layouts(small_job(), gpus):
            assert gpus % way.shard == gpus % way.experts == 0
            assert way.gpus == gpus
    assert any(way.experts > 1 for way in layouts(small_job(), 8))
    assert all(way.experts == 1 for way in layouts(small_job(grad_loops=2), 8))
    assert all(way.experts == 1 for way in layouts(small_job(model=DENSE_FFN), 8))
    dense = small_job(1, model=DENSE_FFN, n_layers=4)
    assert not any(way.checkpoint_loops for way in layouts(dense, 8))


def test_options_are_those_of_a_run() -> None:
    """The options that the plan prints are valid for ``open-mythos train``."""
    job = small_job(4, optimizer="muon", dtype="float16", grad_loops=2, ema=True)
    layout = Layout(16, "fsdp", 8, 1, True, 2, 3)
    words = layout.options(job).split()
    values: dict = {"model": job.cfg.to_dict()}
    for name, value in zip(words[::2], words[1::2], strict=True):
        section, field = name.removeprefix("--").split(".")
        values.setdefault(section, {})[field] = yaml.safe_load(value)
    run = RunConfig.from_dict(values)
    assert (run.parallel.kind, run.parallel.shard) == ("fsdp", 8)
    assert (run.train.micro_batch, run.train.global_batch) == (2, layout.global_batch) == (2, 96)
    assert (run.train.checkpoint_loops, run.train.grad_loops) == (True, 2)
    assert (run.train.dtype, run.train.seq_len, run.optim.name) == ("float16", 32, "muon")
    assert run.optim.ema_decay > 0
    assert (run.depth.plan, run.depth.mean) == ("fixed", 4)
    drawn = layout.options(small_job(4, n_loops=2.5))
    assert "--depth.mean 2.5 --depth.max_loops 4" in drawn
    assert "depth" not in layout.options(small_job(1, model=DENSE_FFN, n_layers=4))


@pytest.mark.usefixtures("simple_memory")
def test_time_cost_and_json() -> None:
    plan = make_plan(small_job(), H100, 8, 1e9, mfu=0.5, price=2.0)
    assert plan.steps == -(-1_000_000_000 // plan.step_tokens)
    flops = plan.step_tokens * plan.job.training_flops()
    assert plan.compute_seconds == pytest.approx(flops / (8 * 0.5 * 989.4e12))
    assert not plan.layout.checkpoint_loops
    best, worst = plan.step_seconds
    assert worst == best + plan.traffic_seconds
    assert plan.utilization[0] == pytest.approx(0.5)
    assert plan.gpu_hours[1] == pytest.approx(plan.steps * worst * 8 / 3600)
    assert plan.cost[1] == pytest.approx(2.0 * plan.gpu_hours[1])
    assert plan.days[1] == pytest.approx(plan.gpu_hours[1] / 24 / 8)
    values = json.loads(json.dumps(plan.to_dict()))
    assert values["layout"]["gpus"] == 8
    assert values["memory"]["total"] == sum(values["memory"]["parts"].values())
    assert values["counts"]["parameters"] == small_job().counts.parameters
    assert values["cache"]["bytes"] > values["cache"]["bytes_shared"]


def test_recomputation_takes_time() -> None:
    job = job_of("1b")
    kept, recomputed = (
        step_seconds(job, H100, Layout(8, "ddp", checkpoint_loops=flag), 0.3)[0]
        for flag in (False, True)
    )
    per_loop = job.counts.forward_flops(1) - job.counts.forward_flops(0)
    assert job.recomputed_flops() == pytest.approx(16 * per_loop)
    assert replace(job, grad_loops=4).recomputed_flops() == pytest.approx(4 * per_loop)
    assert 1.2 < recomputed / kept < 4 / 3


def test_flops_follow_the_mean_depth_and_memory_the_maximum() -> None:
    job, one = small_job(8, n_loops=3.5), Layout(1, "none")
    assert job.training_flops() == job.counts.training_flops(3.5)
    assert memory(job, one) == memory(small_job(8), one)
    cfg = small_job().cfg
    job = Job(cfg, context=32)
    before = job.cfg.dim
    cfg.dim *= 2
    assert job.cfg.dim == before


@pytest.mark.parametrize(
    "changes",
    [{"context": 0}, {"context": 257}, {"n_loops": 5}, {"n_loops": 0}, {"max_loops": 0},
     {"max_loops": 10**6},
     {"grad_loops": 0}, {"dtype": "int8"}, {"optimizer": "sgd"}],
)  # fmt: skip
def test_invalid_jobs_are_rejected(changes: dict) -> None:
    with pytest.raises(ConfigError):
        small_job(**changes)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"gpus": 0}, "gpus"), ({"tokens": 0}, "tokens"), ({"mfu": 0}, "mfu"),
        ({"mfu": 1.5}, "mfu"), ({"price": -1}, "price"), ({"batch_tokens": 64}, "global_batch"),
        ({"batch_tokens": -1}, "global_batch"), ({"gpus": 1_000_000_007}, "gpus"),
        ({"batch_tokens": 1e18}, "global_batch"),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_rejected(options: dict, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(small_job(), H100, **({"gpus": 8, "tokens": 1e9} | options))
    assert where in caught.value.where


@pytest.mark.usefixtures("simple_memory")
def test_the_batch_is_rounded_to_the_gpus() -> None:
    for gpus, sequences in ((8, 1000), (3, 999)):
        plan = make_plan(small_job(), H100, gpus, 1e6, batch_tokens=1000 * 32)
        assert plan.layout.global_batch == sequences


def test_counts_and_gpus_are_parsed() -> None:
    texts = {"30B": 30e9, "1.5T": 1.5e12, "2e10": 2e10, "500m": 5e8, "7 k": 7e3, "1_000": 1e3}
    for text, value in (texts | {3e10: 3e10, 12: 12.0}).items():
        assert parse_count(text, "tokens") == value
    for text in ("", "B", "-3B", "3Q", "0", "nan", "1e999", "3 apples", "1.2.3"):
        with pytest.raises(ConfigError, match="not a number of tokens"):
            parse_count(text, "tokens")
    assert gpu("H100") is GPUS["h100"]
    with pytest.raises(ConfigError, match="h100"):
        gpu("h101")
