"""float16: the scale follows the rule of GradScaler, and a step that overflows changes nothing."""

import pytest
import torch

from open_mythos.train import Trainer, build_model
from open_mythos.train.optimizers.loss_scale import INTERVAL, LossScale
from tests.train.conftest import CountingLoader, tiny_run

CPU = torch.device("cpu")


def update(scale, overflowed):
    return scale.update(torch.tensor(not overflowed)).item()


def test_it_follows_grad_scaler():
    ours = LossScale(CPU, dynamic=True)
    theirs = torch.amp.GradScaler("cpu")
    overflows = {3, 4, 9, INTERVAL + 20}
    for step in range(2 * INTERVAL + 50):
        weight = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.SGD([weight])
        theirs.scale(weight.sum()).backward()
        if step in overflows:
            weight.grad.fill_(torch.inf)
        theirs.step(optimizer)
        theirs.update()
        assert update(ours, step in overflows) == (step in overflows)
        assert ours.scale.item() == theirs.get_scale(), step


def test_other_dtypes_have_none():
    scale = LossScale(CPU, dynamic=False)
    assert not update(scale, overflowed=True)
    assert scale.state_dict() == {"scale": 1.0, "good_steps": 0, "dynamic": False}


def test_it_is_not_lowered_below_one():
    scale = LossScale(CPU, dynamic=True)
    scale.load_state_dict({"scale": 2.0, "good_steps": 7, "dynamic": True})
    assert update(scale, overflowed=True)
    assert not update(scale, overflowed=True)
    assert scale.state_dict() == {"scale": 1.0, "good_steps": 0, "dynamic": True}


def test_float16_learns_what_float32_does():
    losses = {}
    for dtype in ("float32", "float16"):
        run = tiny_run(train={"dtype": dtype, "steps": 20}, optim={"lr": 5e-3})
        trainer = Trainer(build_model(run), CountingLoader(run), run)
        steps = [trainer.train_step(step) for step in range(20)]
        losses[dtype] = [each.loss for each in steps if not each.skipped]
        if dtype == "float16":
            assert trainer.stepper.scale.dynamic
            assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert losses["float16"][-1] == pytest.approx(losses["float32"][-1], abs=0.05)
    assert losses["float16"][-1] < losses["float16"][0] - 0.3


def test_an_overflow_halves_the_scale_and_is_no_skip_of_a_row():
    run = tiny_run(train={"dtype": "float16", "max_skips": 0})
    trainer = Trainer(build_model(run), CountingLoader(run), run)
    trainer.stepper.scale.scale.fill_(2.0**40)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    result = trainer.train_step(0)
    assert result.skipped
    assert (trainer.stepper.scale.scale, trainer.state.skips) == (2.0**39, 0)
    assert all(
        torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items()
    )
