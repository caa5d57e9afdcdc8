"""Run configurations: round trip, refusals, no torch."""

import json
from dataclasses import fields, is_dataclass

import pytest

from open_mythos.config import MythosConfig
from open_mythos.errors import ConfigError
from open_mythos.train import DEPTH_PLANS, SCHEDULES, RunConfig
from open_mythos.train.config import (
    DEPTH_PLAN_NAMES,
    LOGGER_NAMES,
    SCHEDULE_NAMES,
    DepthConfig,
    OptimConfig,
    TrainConfig,
    WatchConfig,
)
from open_mythos.train.monitoring.loggers import LOGGERS


def test_defaults_are_valid():
    RunConfig().validate()


def test_round_trip_through_json(make_run):
    run = make_run(depth={"plan": "uniform"}, train={"eval_depths": [1, 4], "grad_loops": "auto"})
    again = RunConfig.from_dict(json.loads(json.dumps(run.to_dict())))
    assert again == run


def test_missing_fields_take_their_defaults():
    run = RunConfig.from_dict({"train": {"steps": 7, "warmup_steps": 1}})
    assert run.train.steps == 7
    assert run.optim == OptimConfig()
    assert run.model == MythosConfig()


@pytest.mark.parametrize(
    ("values", "nearest"),
    [
        ({"trian": {}}, "train"),
        ({"train": {"step": 3}}, "steps"),
        ({"optim": {"weight_deca": 0}}, "weight_decay"),
        ({"model": {"n_head": 4}}, "n_heads"),
    ],
)
def test_unknown_keys_name_the_nearest(values, nearest):
    with pytest.raises(ConfigError, match=f"did you mean '{nearest}'"):
        RunConfig.from_dict(values)


def test_a_section_must_be_a_mapping():
    with pytest.raises(ConfigError, match="mapping"):
        RunConfig.from_dict({"train": 3})


@pytest.mark.parametrize(
    ("section", "field", "bad"),
    [
        ("depth", "plan", "gauss"), ("depth", "mean", 0.5), ("depth", "mean", float("nan")),
        ("depth", "low", 0), ("depth", "high", 0), ("depth", "sigma", -1.0),
        ("depth", "max_loops", 0), ("depth", "curriculum_start", 0.0),
        ("depth", "curriculum_steps", -1),
        ("optim", "lr", 0.0), ("optim", "beta1", 1.0), ("optim", "beta2", -0.1),
        ("optim", "eps", 0.0), ("optim", "weight_decay", -1.0),
        ("data", "eval_windows", 0), ("data", "document_masks", 1),
        ("train", "seed", -1), ("train", "steps", 0), ("train", "steps", True),
        ("train", "seq_len", 0), ("train", "seq_len", 5000), ("train", "global_batch", 0),
        ("train", "micro_batch", 3), ("train", "schedule", "step"), ("train", "decay_shape", "x"),
        ("train", "warmup_steps", -1), ("train", "decay_steps", 0), ("train", "min_lr_ratio", 1.1),
        ("train", "clip", 0.0), ("train", "clip", float("inf")), ("train", "max_skips", -1),
        ("train", "dtype", "float8"), ("train", "grad_loops", 0), ("train", "grad_loops", "half"),
        ("train", "checkpoint_loops", 1), ("train", "balance_speed", -1.0),
        ("train", "balance_coefficient", -1.0), ("train", "log_every", 0),
        ("train", "eval_every", -1), ("train", "eval_depths", [0]), ("train", "save_every", 5),
        ("train", "keep", 0),
        ("optim", "name", "sgd"),
        ("optim", "momentum", 1.0),
        ("optim", "nesterov", 1),
        ("optim", "ns_steps", 0),
        ("optim", "ema_decay", 1.0),
        ("train", "compile", 1),
        ("train", "async_save", None),
        ("parallel", "kind", "tensor"),
        ("parallel", "shard", 4),
        ("parallel", "experts", 2),
        ("parallel", "timeout", 0),
        ("watch", "spike_window", 4),
        ("watch", "spike_threshold", 0),
        ("watch", "spike_patience", 0),
        ("watch", "max_rewinds", -1),
        ("watch", "watchdog", 1),
        ("watch", "peak_flops", 0.0),
    ],
)  # fmt: skip
def test_out_of_range_names_the_field(section, field, bad):
    run = RunConfig()
    setattr(getattr(run, section), field, bad)
    with pytest.raises(ConfigError) as caught:
        run.validate()
    assert caught.value.where == f"{section}.{field}"


@pytest.mark.parametrize(
    ("run", "field"),
    [
        (RunConfig(depth=DepthConfig(plan="fixed", mean=2.5)), "depth.mean"),
        (
            RunConfig(depth=DepthConfig(plan="uniform", curriculum_steps=5)),
            "depth.curriculum_steps",
        ),
        (
            RunConfig(
                train=TrainConfig(schedule="wsd", steps=100, warmup_steps=60, decay_steps=50)
            ),
            "train.decay_steps",
        ),
        (RunConfig(architecture="sparse"), "architecture"),
        (RunConfig(train=TrainConfig(out_dir="")), "train.out_dir"),
        (RunConfig(train=TrainConfig(device="meta")), "train.device"),
        (RunConfig(watch=WatchConfig(loggers=["nope"])), "watch.loggers"),
        (RunConfig(watch=WatchConfig(loggers=["wandb"])), "watch.loggers"),
        (RunConfig(architecture="dense", train=TrainConfig(grad_loops=2)), "train.grad_loops"),
        (
            RunConfig(architecture="dense", train=TrainConfig(checkpoint_loops=True)),
            "train.checkpoint_loops",
        ),
        (
            RunConfig(architecture="dense", train=TrainConfig(balance_coefficient=0.1)),
            "train.balance_coefficient",
        ),
        (
            RunConfig(model=MythosConfig(n_experts=0), train=TrainConfig(balance_coefficient=0.1)),
            "train.balance_coefficient",
        ),
        (RunConfig(model=MythosConfig(dim=0)), "MythosConfig.dim"),
    ],
)
def test_fields_that_do_not_go_together(run, field):
    with pytest.raises(ConfigError) as caught:
        run.validate()
    assert caught.value.where == field


def test_grad_loops_auto_is_half_the_mean_rounded_up():
    assert (
        RunConfig(depth=DepthConfig(mean=5.0), train=TrainConfig(grad_loops="auto")).grad_loops == 3
    )
    huginn = DepthConfig(plan="lognormal_poisson", mean=8.0)
    assert RunConfig(depth=huginn, train=TrainConfig(grad_loops="auto")).grad_loops == 5
    assert RunConfig(train=TrainConfig(grad_loops=3)).grad_loops == 3
    assert RunConfig().grad_loops is None


def test_eval_depths_default_to_the_mean():
    assert RunConfig(depth=DepthConfig(plan="uniform", low=4, high=8)).eval_depths == [6]
    assert RunConfig(train=TrainConfig(eval_depths=[1, 16])).eval_depths == [1, 16]


def test_names_match_the_tables():
    assert tuple(DEPTH_PLANS) == DEPTH_PLAN_NAMES
    assert tuple(SCHEDULES) == SCHEDULE_NAMES
    assert tuple(LOGGERS) == LOGGER_NAMES


def test_fields_are_all_documented():
    import inspect

    from open_mythos.train import config

    lines = inspect.getsource(config).splitlines()
    sections = (RunConfig, config.DataConfig, DepthConfig, OptimConfig, TrainConfig)
    for section in sections:
        assert is_dataclass(section)
        for field in fields(section):
            at = next(i for i, line in enumerate(lines) if line.startswith(f"    {field.name}: "))
            assert lines[at + 1].startswith('    """'), field.name
