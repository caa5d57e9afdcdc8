"""The recommended layout, and the refusal where none fits."""

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

from .small import job_of, small_job

H100 = gpu("h100")


def planned(name: str, gpus: int, gpu_name: str = "h100", **options: object):
    return make_plan(job_of(name), gpu(gpu_name), gpus, 1e9, **options)


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

    def needs(job: Job, layout: Layout) -> Memory:
        return Memory({"weights": total(job, layout)}, "backward")

    for name in ("counted_bytes", "likely_bytes"):
        monkeypatch.setattr(choose, name, total)
    for name in ("memory", "estimate"):
        monkeypatch.setattr(choose, name, needs)
    monkeypatch.setattr(report, "memory", needs)
    monkeypatch.setattr(report, "activations_per_loop", lambda job: {})


def test_what_is_recommended_fits() -> None:
    wish = Wish(kind="ddp", checkpoint_loops=False)
    plan = make_plan(small_job(2), H100, 8, 1e9, batch_tokens=8 * 4 * 32, wish=wish)
    assert plan.memory.total <= plan.gpu.usable < plan.gpu.memory
    assert plan.memory == memory(plan.job, plan.layout)
    assert plan.layout.gpus == 8
    assert plan.layout.global_batch % 8 == 0
    assert plan.layout.micro_batch == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("gpus", "gpu_name"), [(8, "h100"), (1024, "b200")])
def test_every_variant_has_an_answer(name: str, gpus: int, gpu_name: str) -> None:
    try:
        least, fits = planned(name, gpus, gpu_name).memory, True
    except DoesNotFitError as error:
        least, fits = error.least, False
    assert (least.total <= gpu(gpu_name).usable) == fits


@pytest.mark.usefixtures("simple_memory")
@pytest.mark.parametrize("megabytes", [3, 4, 6, 12])
def test_no_layout_that_fits_is_much_faster(megabytes: float) -> None:
    job, gpus, local, small = small_job(4), 8, 4, with_memory(megabytes)
    layout = choose.choose(job, small, gpus, local, 0.3)
    seconds = sum(step_seconds(job, H100, layout, 0.3))
    assert choose.fits(job, small, layout)
    for way in layouts(job, gpus):
        for size in (1, 2, 4):
            other = replace(way, micro_batch=size, micro_batches=local // size)
            if way.shard in (1, 8) and choose.fits(job, small, other):
                assert sum(step_seconds(job, H100, other, 0.3)) > seconds / 1.03


@pytest.mark.usefixtures("simple_memory")
def test_the_less_memory_the_slower() -> None:
    found = [choose.choose(small_job(4), with_memory(mb), 8, 4, 0.3) for mb in (3, 4, 6, 12, 100)]
    seconds = [sum(step_seconds(small_job(4), H100, each, 0.3)) for each in found]
    assert all(fast <= 1.03 * slow for slow, fast in pairwise(seconds))
    assert found[0].kind == "fsdp"
    assert (found[-1].kind, found[-1].micro_batch) == ("ddp", 4)


@pytest.mark.usefixtures("simple_memory")
def test_fixed_parts_are_kept() -> None:
    job, large = small_job(4), with_memory(1000)
    wish = Wish(kind="fsdp", shard=4, experts=2, micro_batch=2, checkpoint_loops=True)
    assert wish.allows(choose.choose(job, large, 8, 4, 0.3, wish))
    for name, value in vars(wish).items():
        layout = choose.choose(job, large, 8, 4, 0.3, Wish(**{name: value}))
        assert getattr(layout, name) == value
    for impossible in (Wish(shard=3), Wish(kind="ddp", shard=8)):
        with pytest.raises(ConfigError, match="no such layout"):
            choose.choose(job, large, 8, 4, 0.3, impossible)


@pytest.mark.usefixtures("simple_memory")
def test_an_error_says_how_many_gpus_suffice() -> None:
    job, small = small_job(4), with_memory(2.5)
    with pytest.raises(DoesNotFitError) as caught:
        choose.choose(job, small, 2, 1, 0.3)
    error = caught.value
    assert error.exit_code == 2
    assert error.gpus_needed is not None
    assert str(error.gpus_needed) in error.fix
    assert error.least.total > small.usable
    assert choose.choose(job, small, error.gpus_needed, 1, 0.3).gpus == error.gpus_needed
    with pytest.raises(DoesNotFitError):
        choose.choose(job, small, error.gpus_needed // 2, 1, 0.3)


@pytest.mark.usefixtures("simple_memory")
def test_a_fixed_part_that_does_not_fit_is_told_from_gpus_that_do_not_suffice() -> None:
    job, small = small_job(4), with_memory(4)
    assert choose.choose(job, small, 8, 1, 0.3).kind == "fsdp"
    with pytest.raises(DoesNotFitError) as caught:
        choose.choose(job, small, 8, 1, 0.3, Wish(kind="ddp"))
    assert caught.value.layout.kind == "ddp"
    assert caught.value.gpus_needed == 8
    assert "leave more of the layout" in caught.value.fix


def test_an_error_names_the_weights_that_no_number_of_gpus_divides() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        make_plan(small_job(1, context=4), with_memory(0.5), 8, 1e6)
    assert caught.value.gpus_needed is None
    assert "no number" in caught.value.fix
    assert max(caught.value.least.parts.items(), key=lambda part: part[1])[0] == "gathered weights"


@pytest.mark.usefixtures("simple_memory")
def test_an_error_names_a_context_that_fits() -> None:
    job, small = small_job(4, context=256), with_memory(4)
    with pytest.raises(DoesNotFitError) as caught:
        choose.choose(replace(job), small, 4, 1, 0.3, Wish(checkpoint_loops=True, kind="ddp"))
    shorter = choose._context_that_fits(
        small_job(4, context=2048, model={"max_seq_len": 2048}), with_memory(6), 64, 1
    )
    assert shorter == 512
    assert caught.value.layout.kind == "ddp"


def test_divided_experts_and_truncation_exclude_each_other() -> None:
    assert any(way.experts > 1 for way in layouts(small_job(), 8))
    assert all(way.experts == 1 for way in layouts(small_job(grad_loops=2), 8))
    assert all(way.experts == 1 for way in layouts(small_job(model={"n_experts": 0}), 8))
    dense = small_job(1, model={"n_experts": 0}, n_layers=4)
    assert not any(way.checkpoint_loops for way in layouts(dense, 8))


def test_options_are_those_of_a_run() -> None:
    """What the plan prints can be pasted behind ``open-mythos train``."""
    job = small_job(4, optimizer="muon", dtype="float16", grad_loops=2)
    layout = Layout(16, "fsdp", 8, 1, True, 2, 3)
    words = layout.options(job).split()
    given = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    values: dict = {}
    for name, value in given.items():
        section, field = name.split(".")
        values.setdefault(section, {})[field] = yaml.safe_load(value)
    run = RunConfig.from_dict(values | {"model": job.cfg.to_dict()})
    assert (run.parallel.kind, run.parallel.shard) == ("fsdp", 8)
    assert (run.train.micro_batch, run.train.global_batch) == (2, layout.global_batch) == (2, 96)
    assert (run.train.checkpoint_loops, run.train.grad_loops) == (True, 2)
    assert (run.train.dtype, run.train.seq_len, run.optim.name) == ("float16", 32, "muon")


def test_layouts_divide_the_gpus() -> None:
    for gpus in (1, 6, 8):
        for way in layouts(small_job(), gpus):
            assert gpus % way.shard == gpus % way.experts == 0
            assert way.gpus == gpus


@pytest.mark.usefixtures("simple_memory")
def test_time_and_cost() -> None:
    plan = make_plan(small_job(), H100, 8, 1e9, mfu=0.5, price=2.0)
    assert plan.steps == -(-1_000_000_000 // plan.step_tokens)
    flops = plan.step_tokens * plan.job.training_flops()
    assert plan.compute_seconds == pytest.approx(flops / (8 * 0.5 * 989.4e12))
    assert not plan.layout.checkpoint_loops
    best, worst = plan.step_seconds
    assert worst == best + plan.traffic_seconds
    assert plan.utilisation[0] == pytest.approx(0.5)
    assert plan.gpu_hours[1] == pytest.approx(plan.steps * worst * 8 / 3600)
    assert plan.cost[1] == pytest.approx(2.0 * plan.gpu_hours[1])
    assert plan.days[1] == pytest.approx(plan.gpu_hours[1] / 24 / 8)


def test_recomputation_takes_time() -> None:
    job = job_of("1b")
    kept, again = (
        step_seconds(job, H100, Layout(8, "ddp", checkpoint_loops=flag), 0.3)[0]
        for flag in (False, True)
    )
    per_loop = job.counts.forward_flops(1) - job.counts.forward_flops(0)
    assert job.recomputed_flops() == pytest.approx(16 * per_loop)
    assert 1.2 < again / kept < 4 / 3
    truncated = replace(job, grad_loops=4)
    assert truncated.recomputed_flops() == pytest.approx(4 * per_loop)


def test_mean_and_largest_depth() -> None:
    """Computing costs what the mean costs; memory holds the deepest."""
    job = small_job(8, n_loops=3.5)
    assert job.training_flops() == job.counts.training_flops(3.5)
    deepest = small_job(8)
    assert memory(job, Layout(1, "none")) == memory(deepest, Layout(1, "none"))


@pytest.mark.parametrize(
    "changes",
    [{"context": 0}, {"context": 257}, {"n_loops": 5}, {"n_loops": 0}, {"max_loops": 0},
     {"grad_loops": 0}, {"dtype": "int8"}, {"optimizer": "sgd"}],
)  # fmt: skip
def test_bad_jobs(changes: dict) -> None:
    with pytest.raises(ConfigError):
        small_job(**changes)


def test_a_job_does_not_change_with_the_configuration_it_was_made_from() -> None:
    cfg = small_job().cfg
    job = Job(cfg, context=32)
    before = memory(job, Layout(1, "none"))
    cfg.dim *= 2
    assert memory(job, Layout(1, "none")) == before


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"gpus": 0}, "gpus"), ({"tokens": 0}, "tokens"), ({"mfu": 0}, "mfu"),
        ({"mfu": 1.5}, "mfu"), ({"price": -1}, "price"), ({"batch_tokens": 64}, "global_batch"),
    ],
)  # fmt: skip
def test_bad_numbers(options: dict, where: str) -> None:
    fields = {"gpus": 8, "tokens": 1e9} | options
    with pytest.raises(ConfigError) as caught:
        make_plan(small_job(), H100, fields.pop("gpus"), fields.pop("tokens"), **fields)
    assert where in caught.value.where


@pytest.mark.usefixtures("simple_memory")
def test_the_batch_is_rounded_to_the_gpus() -> None:
    plan = make_plan(small_job(), H100, 8, 1e6, batch_tokens=1000 * 32)
    assert plan.layout.global_batch == 1000
    plan = make_plan(small_job(), H100, 3, 1e6, batch_tokens=1000 * 32)
    assert plan.layout.global_batch == 999


@pytest.mark.parametrize(
    ("text", "value"),
    [("30B", 30e9), ("1.5T", 1.5e12), ("2e10", 2e10), ("500m", 5e8), (3e10, 3e10), ("7 k", 7e3),
     (12, 12.0), ("1_000", 1000.0)],
)  # fmt: skip
def test_counts_are_read(text: str | float, value: float) -> None:
    assert parse_count(text, "tokens") == value


@pytest.mark.parametrize("text", ["", "B", "-3B", "3Q", "0", "nan", "1e999", "3 apples", "1.2.3"])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(ConfigError, match="not a number of tokens"):
        parse_count(text, "tokens")


def test_unknown_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match="h100"):
        gpu("h101")
    assert gpu("H100") is GPUS["h100"]


@pytest.mark.usefixtures("simple_memory")
def test_plans_are_json() -> None:
    values = json.loads(json.dumps(make_plan(small_job(), H100, 8, 1e9).to_dict()))
    assert values["layout"]["gpus"] == 8
    assert values["memory"]["total"] == sum(values["memory"]["parts"].values())
    assert values["counts"]["parameters"] == small_job().counts.parameters
    assert values["cache"]["bytes"] > values["cache"]["bytes_shared"]
