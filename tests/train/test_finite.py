"""A state that is not finite is never published, never prunes a good one, never resumed from."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from open_mythos.errors import DataError
from open_mythos.train.build import build_model
from open_mythos.train.checkpoint.find import checkpoints, find_checkpoint
from open_mythos.train.checkpoint.manifest import (
    MANIFEST_FILE,
    entry_of_file,
    manifest_text,
)
from open_mythos.train.finite import spoilt
from open_mythos.train.trainer import DivergedError, Trainer


def trainer_of(make_run, make_loader, out, **train):
    run = make_run(train={"out_dir": str(out), "save_every": 1, "keep": 2, **train})
    return Trainer(build_model(run), make_loader(run), run)


def all_finite(folder) -> bool:
    tensors = [t for file in folder.glob("*.safetensors") for t in load_file(file).values()]
    return len(tensors) > 50 and all(tensor.isfinite().all() for tensor in tensors)


def poison_update(trainer, step, what="weights"):
    """At this step the update overflows, although loss and gradient are finite."""
    take = trainer.stepper.take

    def poisoned(number, *args, **options):
        result = take(number, *args, **options)
        if number == step:
            state = trainer.optimizer.state[trainer.model.head.weight]
            target = trainer.model.head.weight.data if what == "weights" else state["exp_avg"]
            target[0, 0] = torch.inf
        return result

    trainer.stepper.take = poisoned


@pytest.mark.parametrize("what", ["weights", "moments"])
def test_an_overflow_is_neither_saved_nor_prunes(make_run, make_loader, tmp_path, what):
    trainer = trainer_of(make_run, make_loader, tmp_path)
    poison_update(trainer, 3, what)
    with pytest.raises(DivergedError, match="not finite"):
        trainer.fit()
    kept = checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in kept] == ["step_00000002", "step_00000003"]
    assert all(all_finite(path) for path in kept)
    assert trainer.state.rewinds == trainer.config.watch.max_rewinds > 0


def test_one_overflow_costs_one_rollback(make_run, make_loader, tmp_path):
    trainer = trainer_of(make_run, make_loader, tmp_path)
    poison_update(trainer, 3)
    poisoned, calls = trainer.stepper.take, []

    def once(number, *args, **options):
        calls.append(number)
        first = calls.count(3) == 1
        return (poisoned if first else type(trainer.stepper).take.__get__(trainer.stepper))(
            number, *args, **options
        )

    trainer.stepper.take = once
    assert trainer.fit().step == 6
    assert trainer.state.rewinds == 1
    assert all(all_finite(path) for path in checkpoints(tmp_path / "checkpoints"))


def test_a_rate_that_overflows_the_first_step_leaves_no_checkpoint(make_run, make_loader, tmp_path):
    run = make_run(
        optim={"lr": 1e38},
        train={"out_dir": str(tmp_path), "save_every": 1, "keep": 2, "warmup_steps": 0},
    )
    trainer = Trainer(build_model(run), make_loader(run), run)
    with pytest.raises(DivergedError) as found:
        trainer.fit()
    assert found.value.exit_code
    assert checkpoints(tmp_path / "checkpoints") == []


def test_save_refuses_what_is_not_finite(make_run, make_loader, tmp_path):
    trainer = trainer_of(make_run, make_loader, tmp_path)
    trainer.model.head.weight.data[0, 0] = torch.nan
    with pytest.raises(DivergedError, match=r"head\.weight"):
        trainer.save()
    assert checkpoints(tmp_path / "checkpoints") == []


def test_averaged_weights_count_too(make_run):
    model = build_model(make_run())
    optimizer = torch.optim.SGD([{"params": [model.head.weight], "param_names": ["head.weight"]}])
    extra = {"average.safetensors": {"head.weight": torch.tensor([1.0, math.inf])}}
    assert spoilt(model, optimizer) == ""
    assert "average.safetensors" in spoilt(model, optimizer, extra)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_resuming_falls_back_behind_what_is_not_finite(make_run, make_loader, tmp_path, file):
    """Checkpoints of other versions may hold such a state, with hashes that are right."""
    trainer_of(make_run, make_loader, tmp_path).fit()
    older, newest = checkpoints(tmp_path / "checkpoints")
    tensors = load_file(newest / file)
    next(each for each in tensors.values() if each.dim())[0] = torch.nan
    save_file(tensors, newest / file, metadata={"format": "pt"})
    names = [path.name for path in newest.iterdir() if path.name != MANIFEST_FILE]
    text = manifest_text({name: entry_of_file(newest / name) for name in names})
    (newest / MANIFEST_FILE).write_text(text)
    assert find_checkpoint(tmp_path) == older
    with pytest.raises(DataError, match="not finite"):
        find_checkpoint(tmp_path, strict=True)
