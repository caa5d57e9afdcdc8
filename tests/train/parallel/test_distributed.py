"""Losses, weights and depths of several processes equal those of one."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from open_mythos.hub.pretrained import save_pretrained
from open_mythos.train import Trainer, build_model
from tests.train.conftest import CountingLoader, tiny_run
from tests.train.ranks import run_ranks

RUN = {"depth": {"plan": "uniform", "low": 1, "high": 5}, "train": {"balance_coefficient": 0.01,
       "steps": 6}}  # fmt: skip
KINDS = {
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
    "hsdp": {"kind": "fsdp", "shard": 2},
    "experts": {"kind": "fsdp", "experts": 2},
}


class Losses:
    def __init__(self):
        self.lines = []

    def log(self, step, metrics):
        self.lines.append({name: metrics[name] for name in ("loss", "grad_norm", "mean_depth")})


def trained(run):
    """Return the metrics of a run (on rank 0), its full weights and its state."""
    losses = Losses()
    trainer = Trainer(build_model(run), CountingLoader(run), run, loggers=[losses])
    trainer.fit()
    return losses.lines, whole(trainer.model.state_dict()), trainer.state


def whole(tensors):
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}


def every_kind(ranks, options, kinds):
    found = {}
    for name, size in kinds:
        with ranks.group(size) as inside:
            if inside:
                found[name, size] = trained(tiny_run(**options, parallel=KINDS[name]))
    return found


EACH_ONCE = [("ddp", 2), ("fsdp", 2), ("experts", 2), ("hsdp", 4)]
ALL = [(name, size) for name in KINDS for size in (2, 4) if (name, size) != ("hsdp", 2)]


OWN = {
    "model": {
        "attn_type": "gqa", "dim": 32, "state_norm": "loop",
        "layer_overrides": {"0": {"window": 3}, "1": {"value_embedding": True}},
    }
}  # fmt: skip
"""A weight that loop and head share, and tables that a layer of the loop reads."""


@pytest.mark.parametrize(
    ("kinds", "train", "own"),
    [
        (EACH_ONCE, {"steps": 3}, {}),
        pytest.param(ALL, {}, {}, marks=pytest.mark.slow),
        pytest.param(ALL, {"micro_batch": 1, "checkpoint_loops": True}, {}, marks=pytest.mark.slow),
        pytest.param(
            ALL, {"micro_batch": 2, "checkpoint_loops": True}, OWN, marks=pytest.mark.slow
        ),
    ],
    ids=["each once", "plain", "micro-batches, checkpointed", "layers with their own"],
)
def test_every_kind_equals_one_process(kinds, train, own):
    assert_equal_runs(kinds, RUN | own | {"train": RUN["train"] | train})


@pytest.mark.slow
def test_every_kind_follows_the_same_teacher(tmp_path):
    save_pretrained(build_model(tiny_run(train={"seed": 7})), tmp_path)
    train = {"steps": 3, "teacher": str(tmp_path), "micro_batch": 2}
    assert_equal_runs(EACH_ONCE, RUN | {"train": RUN["train"] | train})


def assert_equal_runs(kinds, options):
    lines, weights, state = trained(tiny_run(**options))
    found = run_ranks(4, every_kind, options, kinds)
    for key, (got, tensors, at) in found[0].items():
        for step, (a, b) in enumerate(zip(got, lines, strict=True)):
            assert a["loss"] == pytest.approx(b["loss"], abs=5e-6), (key, step)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4), (key, step)
            assert a["mean_depth"] == b["mean_depth"], (key, step)
        assert at == state, key
        assert tensors.keys() == weights.keys()
        for name, value in weights.items():
            torch.testing.assert_close(tensors[name], value, atol=2e-4, rtol=0, msg=f"{key} {name}")
            for other in found[1:]:
                if key in other:
                    assert torch.equal(other[key][1][name], tensors[name]), (key, name)
