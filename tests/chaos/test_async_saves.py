"""R4: a save behind the training is a true snapshot, and its failure does not stay unknown."""

from __future__ import annotations

import threading
from concurrent.futures import wait
from unittest.mock import patch

import pytest

from chaos import small_run
from chaos.broken_variants import CONTROLS
from open_mythos.errors import EnvironmentError_
from open_mythos.train import find_checkpoint
from open_mythos.train.checkpoint import saver as saving
from open_mythos.train.checkpoint import write

BEHIND = {"train": {"async_save": True}}
SOON = 60.0
"""Seconds; only for a test that would hang if it failed."""


@pytest.fixture
def trainer(data, tmp_path):
    return small_run.new_trainer(small_run.run_config(tmp_path / "run", data, BEHIND))


class Gate:
    """Holds every write back until it is opened, and counts those at work."""

    def __init__(self, open_at_first=False):
        self.opened, self.reached = threading.Event(), threading.Event()
        self.now = self.most = 0
        self.order = []
        if open_at_first:
            self.opened.set()
        self._plain = write.fill_folder

    def __call__(self, folder, snapshot, *args):
        self.now += 1
        self.most = max(self.most, self.now)
        self.order.append(f"begin {snapshot.step}")
        self.reached.set()
        assert self.opened.wait(SOON)
        self._plain(folder, snapshot, *args)
        self.order.append(f"end {snapshot.step}")
        self.now -= 1

    def __enter__(self):
        self._patch = patch.object(write, "fill_folder", self)
        self._patch.__enter__()
        return self

    def __exit__(self, *details):
        self.opened.set()
        return self._patch.__exit__(*details)


def saved_while_training_went_on(trainer, steps):
    """Begin a save, train on before a byte is written; returns the tensors of that moment."""
    with Gate() as gate:
        for step in range(3):
            trainer.train_step(step)
        meant = small_run.tensors(trainer)
        path = trainer.save(wait=False)
        assert gate.reached.wait(SOON)
        assert not path.exists()
        for step in range(3, 3 + steps):
            trainer.train_step(step)
        gate.opened.set()
        trainer.saver.wait()
    assert small_run.differing(meant, small_run.tensors(trainer))
    return meant


@pytest.mark.goal("R4", "a background save written after four more steps")
def test_it_is_a_true_snapshot(trainer, data, tmp_path, row):
    meant = saved_while_training_went_on(trainer, 4)
    other = small_run.new_trainer(small_run.run_config(tmp_path / "run", data, BEHIND))
    assert other.resume().step == 3
    assert other.loader.step == 3
    assert small_run.differing(meant, small_run.tensors(other)) == []
    row.outcome = "weights, moments, averages and position are those of the moment it was asked for"


@pytest.mark.goal("control", "a background save without a copy")
def test_a_save_without_a_copy_is_no_snapshot(trainer, data, tmp_path, row):
    with CONTROLS["a background save is no copy"](trainer):
        meant = saved_while_training_went_on(trainer, 4)
    other = small_run.new_trainer(small_run.run_config(tmp_path / "run", data, BEHIND))
    other.resume()
    assert small_run.differing(meant, small_run.tensors(other))
    row.outcome = "a background save that is no copy: caught"


@pytest.mark.goal("R4", "a background save that fails twice")
def test_a_failure_surfaces_at_the_next_step(trainer, row):
    """The save of step 3 fails during step number 4: that is the last one."""
    fetch, steps, fails = trainer.loader.next_batch, [], threading.Event()

    def next_batch(step):
        steps.append(step)
        if step == 4:
            fails.set()
            wait([trainer.saver._pending], SOON)
        return fetch(step)

    def full(*_):
        assert fails.wait(SOON)
        raise OSError(28, "No space left on device")

    trainer.loader.next_batch = next_batch
    with (
        patch.object(write, "fill_folder", full),
        pytest.raises(EnvironmentError_, match="could not be written") as caught,
    ):
        trainer.fit()
    assert caught.value.where.endswith("step_00000003")
    assert steps == [0, 1, 2, 3, 4]
    assert not small_run.has_checkpoint(trainer.out_dir)
    row.outcome = "the step in which it was found out is the last; a clean error"


@pytest.mark.goal("R4", "a save asked for while one is under way")
def test_at_most_one_is_under_way(trainer, row):
    with Gate() as gate:
        trainer.train_step(0)
        trainer.save(wait=False)
        assert gate.reached.wait(SOON)
        trainer.train_step(1)
        plain = trainer.saver.wait

        def waits():
            gate.order.append("the next save waits")
            gate.opened.set()
            plain()

        with patch.object(trainer.saver, "wait", waits):
            trainer.save(wait=False)
        trainer.saver.wait()
    assert gate.most == 1
    assert gate.order == ["begin 1", "the next save waits", "end 1", "begin 2", "end 2"]
    row.outcome = "it waits; there is never more than one"


@pytest.mark.goal("R4", "the last save of a run that saves behind the training")
def test_the_last_save_waits(trainer, row):
    with Gate(open_at_first=True) as gate:
        trainer.fit()
    assert gate.order[-1] == f"end {small_run.STEPS}"
    assert trainer.saver._pending is None
    assert find_checkpoint(trainer.out_dir, strict=True).name == f"step_{small_run.STEPS:08d}"
    row.outcome = "the run ends when it is on the disk"


@pytest.mark.goal("R4", "training that fails while a save is under way")
def test_a_save_under_way_outlives_a_failure(trainer, row):
    fetch = trainer.loader.next_batch

    class OtherError(Exception):
        pass

    def next_batch(step):
        if step == 4:
            raise OtherError
        return fetch(step)

    trainer.loader.next_batch = next_batch
    with pytest.raises(OtherError):
        trainer.fit()
    assert find_checkpoint(trainer.out_dir, strict=True).name == "step_00000003"
    row.outcome = "it is finished before the run ends, and the failure is what is reported"


def test_a_save_in_the_foreground_shares_memory(trainer):
    """No copy where none is needed: the peak of memory is that of the run."""
    trainer.train_step(0)
    arguments = (1, trainer.model, trainer.optimizer, {})
    shared, copied = (saving.take_snapshot(*arguments, copy=each) for each in (False, True))
    for file in shared.tensors:
        for name, value in shared.tensors[file].items():
            assert value.data_ptr() != copied.tensors[file][name].data_ptr()
    weight = trainer.model.head.weight
    assert shared.tensors["model.safetensors"]["head.weight"].data_ptr() == weight.data_ptr()
