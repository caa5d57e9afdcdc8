"""R7: a step that is not finite changes nothing: not a bit of weights, moments or averages."""

from __future__ import annotations

import math
import shutil

import pytest

from chaos import small_run
from chaos.broken_variants import CONTROLS
from chaos.nonfinite_steps import LOOPS, NONFINITE, VALUES
from open_mythos.train import DivergedError

SAME_DEPTH = {"depth": {"plan": "fixed", "mean": float(LOOPS), "curriculum_steps": 0}}


@pytest.fixture
def trainer(data):
    """After two steps, so that there are moments."""
    trainer = small_run.new_trainer(small_run.run_config(None, data, SAME_DEPTH))
    for step in range(2):
        assert not trainer.train_step(step).skipped
    return trainer


def what_changed(trainer, poison, value):
    """Tensors that are different after a injected step; it must have met the poison."""
    before = small_run.tensors(trainer)
    with NONFINITE[poison](trainer, value):
        result = trainer.train_step(trainer.state.step)
    assert result.skipped or not math.isfinite(result.loss * result.grad_norm), "missed"
    return result, small_run.differing(before, small_run.tensors(trainer))


@pytest.mark.goal("R7", "NaN, Inf and -Inf put into one step")
@pytest.mark.parametrize("poison", NONFINITE)
def test_nothing_changes(trainer, row, poison):
    tokens = trainer.state.tokens
    for value in VALUES:
        result, changed = what_changed(trainer, poison, value)
        assert changed == []
        assert result.skipped
        assert all(p.grad is None for p in trainer.stepper.parameters)
        row.count()
    assert trainer.state.skips == len(VALUES)
    assert trainer.state.tokens == tokens
    before = small_run.tensors(trainer)
    assert not trainer.train_step(trainer.state.step).skipped
    assert trainer.state.skips == 0
    assert all(p.isfinite().all() for p in trainer.stepper.parameters)
    assert "head.weight" in small_run.differing(before, small_run.tensors(trainer))
    kinds = sum(name.startswith("average/") for name in before)
    assert kinds > 10
    row.outcome = f"{poison}: weights, moments, averages equal bit for bit; the next step proceeds"


@pytest.mark.goal("R7", "a skipped step, and the same run without that poison in its step")
def test_the_skip_itself_is_all_that_differs(data, tmp_path, row):
    """Resumed from before the poison, the run is what it would have been."""
    out = tmp_path / "run"
    run = small_run.run_config(out, data, SAME_DEPTH)
    clean, injected = small_run.new_trainer(run), None
    for step in range(3):
        clean.train_step(step)
    clean.save()
    shutil.copytree(out, tmp_path / "kept")
    injected = small_run.new_trainer(run)
    injected.resume()
    with NONFINITE["the loss"](injected, float("nan")):
        assert injected.train_step(3).skipped
    again = small_run.new_trainer(run)
    again.resume(tmp_path / "kept" / "checkpoints" / "step_00000003")
    assert small_run.differing(small_run.tensors(again), small_run.tensors(injected)) == []
    assert again.train_step(3).loss == clean.train_step(3).loss
    row.outcome = "the step is counted, nothing is learnt from it"


@pytest.mark.goal("R7", "every step injected")
def test_a_run_that_only_skips_ends(data, tmp_path, row):
    """It goes back to its checkpoint as often as it may, and then stops with an error."""
    changes = {"train": {"max_skips": 2, "save_every": 2}}
    trainer = small_run.new_trainer(small_run.run_config(tmp_path / "run", data, changes))
    fetch, calls = trainer.loader.next_batch, []
    poison = NONFINITE["the loss"](trainer, float("nan"))

    def next_batch(step):
        calls.append(step)
        if len(calls) == 5:
            poison.__enter__()
        return fetch(step)

    trainer.loader.next_batch = next_batch
    try:
        with pytest.raises(DivergedError) as caught:
            trainer.fit()
    finally:
        poison.__exit__(None, None, None)
    assert trainer.state.skips > 2
    assert trainer.state.rewinds == trainer.config.watch.max_rewinds > 0
    assert small_run.has_checkpoint(trainer.out_dir)
    row.count(len(calls))
    row.outcome = f"{caught.value.what}: {caught.value.value}"


@pytest.mark.goal("control", "a bad step multiplied by zero instead of left out")
def test_multiplying_by_zero_is_caught(trainer, row):
    with CONTROLS["a bad step is multiplied by zero"](trainer):
        before = small_run.tensors(trainer)
        with NONFINITE["one element of a gradient"](trainer, float("nan")):
            trainer.train_step(2)
        assert "recurrent.injection.log_A" in small_run.differing(
            before, small_run.tensors(trainer)
        )
    row.outcome = "multiplying by zero: caught"
