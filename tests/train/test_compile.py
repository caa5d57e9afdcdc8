"""Compiled blocks learn what plain ones do."""

import warnings

import pytest

from open_mythos.train import Trainer, build_model
from tests.train.conftest import CountingLoader, tiny_run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_losses_are_equal():
    losses = {}
    for compiled in (False, True):
        run = tiny_run(
            depth={"plan": "uniform", "low": 1, "high": 3},
            train={"compile": compiled, "global_batch": 4},
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = Trainer(build_model(run), CountingLoader(run), run)
            losses[compiled] = [trainer.train_step(step).loss for step in range(3)]
    assert losses[True] == pytest.approx(losses[False], abs=1e-5)
