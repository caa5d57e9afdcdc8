"""R12: a changed configuration is refused, field by field."""

from __future__ import annotations

import shutil

import pytest

from chaos import small_run
from open_mythos.errors import ConfigError
from open_mythos.train.checkpoint.config_changes import MAY_CHANGE, reject_changes


def flat(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def changed(values, name):
    """``values`` with another value for one field."""
    first, _, rest = name.partition(".")
    inner = changed(values[first], rest) if rest else "something else"
    return values | {first: inner}


@pytest.mark.goal("R12", "each field of the configuration changed in turn")
def test_each_field(data, row):
    saved = small_run.run_config("out", data).to_dict()
    refused = 0
    for name, value in flat(saved):
        now = changed(saved, name)
        row.count()
        if name in MAY_CHANGE:
            reject_changes(saved, now)
            continue
        with pytest.raises(ConfigError) as caught:
            reject_changes(saved, now)
        assert f"{name}: saved {value!r}, now 'something else'" in str(caught.value)
        assert caught.value.value == name
        reject_changes(saved, now, allow=[name])
        refused += 1
    assert refused > 40
    row.outcome = f"{refused} refused by name with both values, each allowed by name; the rest free"


@pytest.mark.goal("R12", "a run resumed with other settings")
def test_a_changed_run_is_rejected_before_loading(data, straight, tmp_path, row):
    out = shutil.copytree(straight.out, tmp_path / "run")
    changes = {
        "optim": {"lr": 0.5, "beta1": 0.5}, "depth": {"mean": 3.0}, "train": {"seed": 1},
        "model": {"dropout": 0.1},
    }  # fmt: skip
    trainer = small_run.new_trainer(small_run.run_config(out, data, changes))
    before = small_run.tensors(trainer)
    with pytest.raises(ConfigError) as caught:
        trainer.resume()
    said = str(caught.value)
    for line in (
        "optim.lr: saved 0.003, now 0.5", "optim.beta1: saved 0.9, now 0.5",
        "depth.mean: saved 2.5, now 3.0", "train.seed: saved 0, now 1",
        "model.dropout: saved 0.2, now 0.1",
    ):  # fmt: skip
        assert f"\n    {line}\n" in said
        row.count()
    assert small_run.differing(before, small_run.tensors(trainer)) == []
    row.outcome = "all five named in one message, nothing loaded"
