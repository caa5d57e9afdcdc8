"""A run that goes wrong is rolled back, skips the batches since, and gives up only after that."""

import json
from dataclasses import replace

import pytest
import torch

from open_mythos.train import DivergedError, Trainer, build_model
from tests.train.conftest import CountingLoader, tiny_run


class Fetched(CountingLoader):
    """Remembers what was fetched; some batches are poison."""

    def __init__(self, run, poison=()):
        super().__init__(run)
        self.fetched, self.poison = [], set(poison)

    def next_batch(self, step):
        self.fetched.append(step)
        return super().next_batch(step)


class Events:
    def __init__(self):
        self.events = []

    def log(self, step, metrics):
        if "event" in metrics:
            self.events.append((step, metrics["event"]))

    def of(self, *kinds):
        return [(step, each) for step, each in self.events if each["kind"] in kinds]


def start(run, poison=(), spikes=()):
    events, loader = Events(), Fetched(run, poison)
    trainer = Trainer(build_model(run), loader, run, loggers=[events])
    plain = trainer.stepper._forward_backward

    def hurt(batch, *rest):
        loss, *others = plain(batch, *rest)
        number = int(batch.sample_index[0]) // run.train.global_batch
        if number in loader.poison:
            loss = loss * torch.nan
        return (loss + 50.0 if number in spikes else loss, *others)

    trainer.stepper._forward_backward = hurt
    return trainer, loader, events


def a_run(tmp_path, **train):
    options = {"steps": 14, "out_dir": str(tmp_path), "save_every": 4, "max_skips": 1, "keep": 9}
    return tiny_run(train=options | train)


def test_non_finite_steps_are_rolled_back_and_their_batches_skipped(tmp_path):
    run = a_run(tmp_path)
    trainer, loader, events = start(run, poison={6, 7})
    state = trainer.fit()
    # no checkpoint is saved after step 8 before its outcome is known
    assert loader.fetched == [*range(8), *range(8, 18)]
    assert (state.step, state.rewinds, state.left_out, state.data_step) == (14, 1, 4, 18)
    assert [step for step, _ in events.of("skipped")] == [7, 8]
    [(step, rewound)] = events.of("rewound")
    assert (step, rewound["to"]) == (8, 4)
    assert "not finite" in rewound["why"]


@pytest.mark.parametrize("log_every", [1, 3, 20])
def test_a_rollback_is_decided_one_step_late_however_often_metrics_are_logged(tmp_path, log_every):
    """Batches 4 .. 7 had been used when the outcome of step 6 was read, so all are skipped."""
    run = a_run(tmp_path, log_every=log_every)
    trainer, loader, events = start(run, poison={5, 6})
    state = trainer.fit()
    assert loader.fetched == [*range(8), *range(8, 18)]
    assert (state.step, state.rewinds, state.left_out) == (14, 1, 4)
    assert [(step, each["to"]) for step, each in events.of("rewound")] == [(8, 4)]
    by_hand, _, _ = start(a_run(tmp_path / "by hand"))
    for step in range(4):
        by_hand.train_step(step)
    by_hand.state.left_out = 4
    for step in range(4, 14):
        by_hand.train_step(step)
    for name, value in by_hand.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value), name


def test_a_rolled_back_run_is_resumed_bit_for_bit(tmp_path):
    run = a_run(tmp_path / "whole")
    whole, *_ = start(run, poison={6, 7})
    whole.fit()
    short = a_run(tmp_path / "cut", steps=14)
    cut, *_ = start(short, poison={6, 7})
    step = cut.train_step
    seen = []

    def until(number):
        if len(seen) == 13:
            raise KeyboardInterrupt
        seen.append(number)
        return step(number)

    cut.train_step = until
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    again, loader, _ = start(short, poison={6, 7})
    assert again.resume().step == 8
    assert again.state.left_out == 4
    again.fit()
    assert loader.fetched == list(range(12, 18))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_a_spike_is_rolled_back_too(tmp_path):
    run = a_run(tmp_path, steps=20)
    run = replace(run, watch=replace(run.watch, spike_window=8, spike_patience=2))
    trainer, loader, events = start(run, spikes={9, 10})
    state = trainer.fit()
    # seen when step 11 had been queued, which is a step that is saved
    assert (state.rewinds, state.left_out) == (1, 4)
    assert loader.fetched == [*range(12), *range(12, 24)]
    assert "the loss rose" in events.events[0][1]["why"]


def test_it_gives_up_with_all_that_is_needed_to_find_out_why(tmp_path):
    run = a_run(tmp_path)
    trainer, _, events = start(run, poison=range(6, 99))
    with pytest.raises(DivergedError, match="diverged") as caught:
        trainer.fit()
    assert trainer.state.rewinds == run.watch.max_rewinds == 2
    kinds = [each["kind"] for _, each in events.of("rewound", "stopped")]
    assert kinds == ["rewound", "rewound", "stopped"]
    [bundle] = tmp_path.glob("diverged_step_*.json")
    assert bundle.name in str(caught.value)
    facts = json.loads(bundle.read_text())
    assert facts["state"]["rewinds"] == 2
    assert facts["config"] == run.to_dict()


def test_without_a_checkpoint_a_spike_ends_nothing_and_nan_ends_the_run(tmp_path):
    run = replace(tiny_run(train={"steps": 20, "max_skips": 1}))
    run = replace(run, watch=replace(run.watch, spike_window=8, spike_patience=2))
    trainer, *_ = start(run, spikes={9, 10})
    assert trainer.fit().step == 20
    trainer, *_ = start(run, poison={9, 10})
    with pytest.raises(DivergedError):
        trainer.fit()
