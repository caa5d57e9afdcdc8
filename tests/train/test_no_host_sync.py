"""A training step that is not logged never waits for the device.

Operations whose result the host reads are counted on the CPU; tests/model/test_no_waiting.py does
so for forward and backward pass, where the CPU's kernels read what those of a GPU do not.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from open_mythos.train import Trainer, build_model
from open_mythos.train.step import Stepper
from tests.model.test_no_waiting import noted
from tests.train.conftest import CountingLoader, tiny_run

ON_THE_HOST = {
    "train/depth.py:depths": "numbers of the batch's samples",
    "train/step.py:_sample_seeds": "the same",
    "train/step.py:_counts": "depths that were drawn on the host",
    "train/loss.py:count_targets": "targets of the batch",
    "train/monitoring/monitor.py:add": "depths that were drawn on the host",
}
"""What is read there lies in host memory on every device."""
LATE = "train/state.py:_read"
"""Where the outcome of a step is read, which was copied when the step was queued."""


def places(read: list[str]) -> list[str]:
    """Where the training code reads what may still be computed."""
    return [each for each in read if each not in ON_THE_HOST and each.startswith("train/")]


def a_run(**changes):
    sections = {"train": {"steps": 40, "log_every": 40}} | changes
    sections["train"] = {"steps": 40, "log_every": 40} | changes.get("train", {})
    return tiny_run(**sections)


RUNS = {
    "float32": {},
    "bfloat16": {"train": {"dtype": "bfloat16"}},
    "float16, scaled loss": {"train": {"dtype": "float16"}},
    "gradient accumulation": {"train": {"micro_batch": 2}},
    "balance": {"train": {"balance_speed": 0.01, "balance_coefficient": 0.01}},
    "EMA": {"optim": {"ema_decay": 0.9}},
    "Muon, EMA": {"optim": {"name": "muon", "ema_decay": 0.9}},
    "truncated, checkpointed": {"train": {"grad_loops": 2, "checkpoint_loops": True}},
    "dense": {"architecture": "dense"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_step_reads_nothing(name):
    run = a_run(**RUNS[name])
    stepper = Stepper(build_model(run), run)
    batches = [CountingLoader(run).next_batch(step) for step in range(3)]
    for step, batch in enumerate(batches):
        with noted("cpu") as read:
            stepper.take(step, batch)
        assert places(read) == []


class Watched(CountingLoader):
    """Notes what the host reads from the device between two batches."""

    def __init__(self, run, read):
        super().__init__(run)
        self.read, self.by_step = read, {}

    def next_batch(self, step):
        if step:
            self.by_step[step] = places(self.read)
        batch = super().next_batch(step)
        self.read.clear()
        return batch


@contextmanager
def fitted(poison=False, **changes):
    """The reads of every step of a run of ten, by the number of the step, from 1."""
    run = a_run(train={"steps": 10, "log_every": 4} | changes)
    with noted("cpu") as read:
        loader = Watched(run, read)
        Trainer(build_model(run), loader, run).fit()
    yield loader.by_step


def test_a_run_reads_each_outcome_late_and_metrics_where_they_are_logged():
    with fitted() as by_step:
        unlogged = {step: read for step, read in by_step.items() if step not in (4, 8)}
        assert unlogged.pop(1) == []
        # after a logged step there is nothing left to be read
        assert (unlogged.pop(5), unlogged.pop(9)) == ([], [])
        assert set(map(tuple, unlogged.values())) == {(LATE,)}
        for step in (4, 8):
            read = set(by_step[step])
            assert {"train/trainer.py:_log", "train/loop_summary.py:of"} <= read


@pytest.mark.parametrize(
    ("what", "act"),
    [
        ("decision on the host", lambda loss: bool(torch.isfinite(loss))),
        ("loss on the host", lambda loss: loss.item()),
        ("list", lambda loss: loss.tolist()),
    ],
)
def test_a_read_in_the_step_is_noticed(what, act, monkeypatch):
    plain = Stepper._forward_backward

    def reading(self, *args):
        loss, *others = plain(self, *args)
        act(loss)
        return (loss, *others)

    monkeypatch.setattr(Stepper, "_forward_backward", reading)
    run = a_run()
    with noted("cpu") as read:
        Stepper(build_model(run), run).take(0, CountingLoader(run).next_batch(0))
    assert places(read) == ["train/step.py:take"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["float32", "bfloat16", "EMA", "dense"])
def test_cuda_is_not_waited_for(name):
    run = a_run(**RUNS[name])
    run.train.device = "cuda"
    stepper = Stepper(build_model(run), run)
    batches = [CountingLoader(run).next_batch(step) for step in range(4)]
    stepper.take(0, batches[0]).wait()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, batch in enumerate(batches[1:], start=1):
            stepper.take(step, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_bad_step_is_masked_bit_for_bit(optimizer, dtype):
    """With a bad step between, and without: weights, optimizer state and averages are equal."""
    train = {"dtype": dtype, "balance_speed": 0.01, "micro_batch": 4}
    run = a_run(optim={"name": optimizer, "ema_decay": 0.9}, train=train)
    loader = CountingLoader(run)

    def after(*bad):
        stepper = Stepper(build_model(run), run)
        weight = stepper.model.get_parameter("recurrent.blocks.0.attn.out_proj.weight")
        taken = 0
        for poisoned in (False, False, *bad, False):
            if poisoned:
                hook = weight.register_hook(lambda grad: grad * torch.nan)
            result = stepper.take(taken, loader.next_batch(taken))
            assert result.skipped == poisoned
            if poisoned:
                hook.remove()
            taken += not poisoned
        state = [each for held in stepper.optimizer.state.values() for each in held.values()]
        return [
            *stepper.model.state_dict().values(),
            *state,
            *stepper.average.state_dict().values(),
        ]

    if dtype == "float16":  # a lower scale rounds differently from then on
        assert len(after(True)) == len(after())
        return
    for ours, want in zip(after(True, True), after(), strict=True):
        assert torch.equal(ours, want)
