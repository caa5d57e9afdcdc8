"""A run goes on with any number and kind of processes, and they act as one."""

import itertools
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from open_mythos import from_pretrained
from open_mythos.train import PreemptedError, Trainer, build_model, verify_checkpoint
from tests.train.conftest import CountingLoader, tiny_run
from tests.train.parallel.test_distributed import Losses, whole
from tests.train.ranks import run_ranks

RUN = {"depth": {"plan": "uniform", "low": 1, "high": 4}, "optim": {"ema_decay": 0.9}}
CUT = 4
SHORT = 10, [("ddp", 1), ("ddp", 2), ("fsdp", 2)]
FULL = 24, [(kind, size) for kind in ("ddp", "fsdp") for size in (1, 2, 4)]


def run_of(folder, kind, **train):
    options = RUN | {"train": {"steps": 24, "out_dir": str(folder), "keep": 3} | train}
    return tiny_run(**options, parallel={"kind": kind})


def trainer_of(run, losses=None):
    loggers = [] if losses is None else [losses]
    return Trainer(build_model(run), CountingLoader(run), run, loggers=loggers)


def save_and_resume_everywhere(ranks, folder, steps, kinds):
    """Saved runs, each continued in every way: (from, to) -> losses; and the whole weights."""
    saved, found = {}, {}
    for kind, size in kinds:
        run = run_of(Path(folder) / f"{kind}{size}", kind, steps=steps)
        saved[kind, size] = run.train.out_dir
        with ranks.group(size) as inside:
            if inside:
                trainer = trainer_of(run)
                for step in range(CUT):
                    trainer.train_step(step)
                trainer.save()
                state = whole(trainer.model.state_dict())
                average = whole(trainer.stepper.average.state_dict())
                found["saved", kind, size] = state, average
    for kind, size in kinds:
        with ranks.group(size) as inside:
            for before in kinds if inside else ():
                losses = Losses()
                run = run_of(Path(folder) / f"next-{before}-{kind}{size}", kind, steps=steps)
                trainer = trainer_of(run, losses)
                trainer.resume(saved[before])
                here = whole(trainer.model.state_dict())
                same = all(
                    torch.equal(here[name], value)
                    for name, value in found["saved", *before][0].items()
                ) if ("saved", *before) in found else None  # fmt: skip
                lines = [trainer.train_step(step).loss for step in range(CUT, steps)]
                found[before, (kind, size)] = lines, same
    return found


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(SHORT, marks=pytest.mark.short, id="short"),
        pytest.param(FULL, marks=pytest.mark.chaos, id="full"),
    ],
)
def everywhere(request, tmp_path_factory):
    folder, (steps, kinds) = tmp_path_factory.mktemp("world"), request.param
    most = max(size for _, size in kinds)
    found = run_ranks(most, save_and_resume_everywhere, str(folder), steps, kinds)
    return folder, steps, kinds, found


@pytest.mark.goal("R9", "a run of 1, 2 or 4 processes, replicated or sharded, continued by another")
def test_every_ordered_pair_resumes(everywhere, row):
    _, steps, kinds, found = everywhere
    straight = trainer_of(tiny_run(**RUN, train={"steps": steps}))
    want = [straight.train_step(step).loss for step in range(steps)][CUT:]
    for before, after in itertools.product(kinds, kinds):
        lines, same = found[0][before, after]
        assert same, (before, after)
        assert lines == pytest.approx(want, abs=5e-6), (before, after)
        row.count()
    row.outcome = f"weights equal bit for bit, the next {len(want)} losses within 5e-6"


def test_a_sharded_checkpoint_is_whole_and_loads_as_a_model(everywhere):
    folder, _, kinds, found = everywhere
    for size in (size for kind, size in kinds if kind == "fsdp" and size > 1):
        path = folder / f"fsdp{size}" / "checkpoints" / f"step_{CUT:08d}"
        verify_checkpoint(path)
        assert len(list(path.glob("shard-*.safetensors"))) == size
        weights = from_pretrained(folder / f"fsdp{size}").state_dict()
        want, _ = found[0]["saved", "fsdp", size]
        assert weights.keys() == want.keys()
        assert all(torch.equal(weights[name], value) for name, value in want.items())


def stop_one(ranks, folder, kind, which):
    """Process ``which`` is told to stop in step 3; how each ends, and after which step."""
    with ranks.group(2):
        run = run_of(folder, kind)
        trainer = trainer_of(run)
        step = trainer.train_step

        def told(number):
            if number == 3 and ranks.rank == which:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(number)

        trainer.train_step = told
        with pytest.raises(PreemptedError) as caught:
            trainer.fit()
        assert caught.value.exit_code == 75
        return trainer.state.step


@pytest.mark.goal("R5", "SIGTERM to one process of two")
@pytest.mark.parametrize(("kind", "which"), [("ddp", 0), ("fsdp", 1)])
def test_a_signal_to_one_process_stops_all(tmp_path, row, kind, which):
    assert run_ranks(2, stop_one, str(tmp_path), kind, which) == [4, 4]
    verify_checkpoint(tmp_path / "checkpoints" / "step_00000004")
    row.count()
    row.outcome = f"{kind}: both stop after the same step, with one whole checkpoint and code 75"


def poison_one(ranks, kind, where):
    """Something is NaN in process 1 only, in step 1; what both think of it."""
    with ranks.group(2):
        trainer = trainer_of(tiny_run(**RUN, parallel={"kind": kind}))
        trainer.train_step(0)
        before = {n: t.clone() for n, t in whole(trainer.model.state_dict()).items()}
        average = {n: t.clone() for n, t in whole(trainer.stepper.average.state_dict()).items()}
        plain = trainer.stepper.parallel.train_on

        def injected(function, **arguments):
            out = plain(function, **arguments)
            if ranks.rank == 1 and where == "loss":
                return out._replace(total=out.total * torch.nan, nll=out.nll * torch.nan)
            if ranks.rank == 1:
                # finite loss, one bad gradient
                return out._replace(total=out.total * torch.inf)
            return out

        trainer.stepper.parallel.train_on = injected
        result = trainer.train_step(1)
        trainer.stepper.parallel.train_on = plain
        after = whole(trainer.model.state_dict())
        kept = all(torch.equal(after[n], v) for n, v in before.items())
        averages = whole(trainer.stepper.average.state_dict())
        kept = kept and all(torch.equal(averages[n], v) for n, v in average.items())
        return result.skipped, trainer.state.skips, kept, trainer.train_step(2).skipped


@pytest.mark.goal("R7", "NaN or Inf in one process of two")
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_nonfinite_value_in_one_process_skips_the_step_in_all(row, kind, where):
    assert run_ranks(2, poison_one, kind, where) == [(True, 1, True, False)] * 2
    row.count()
    row.outcome = f"{kind}: both skip; weights and averages equal bit for bit; the next proceeds"


def save_behind(ranks, folder, kind):
    with ranks.group(2):
        run = run_of(folder, kind, async_save=True, save_every=2, steps=6)
        trainer = trainer_of(run)
        trainer.fit()
        return whole(trainer.model.state_dict())


@pytest.mark.goal("R4", "saves behind the training of two processes")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_async_saves(tmp_path, row, kind):
    weights, _ = run_ranks(2, save_behind, str(tmp_path), kind)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000002", "step_00000004", "step_00000006"]
    for name in names:
        verify_checkpoint(tmp_path / "checkpoints" / name)
    stored = from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(stored[name], value) for name, value in weights.items())
    # one process can go on from the one in the middle
    run = replace(run_of(tmp_path / "again", "none"), architecture="looped")
    trainer = trainer_of(run)
    assert trainer.resume(tmp_path / "checkpoints" / "step_00000004").step == 4
    row.count(3)
    row.outcome = f"{kind}: all whole, the last one equal to the weights"


def lose_one(ranks, folder, how):
    """Process 1 dies or hangs in step 3; what the other says of it.

    The hung one lives until the other has noticed, so nothing but the timeout can have told it.
    """
    noticed = Path(folder) / "noticed"
    with ranks.group(2, timeout=60 if how == "killed" else 8):
        run = run_of(folder, "ddp")
        trainer = trainer_of(run)
        step = trainer.train_step

        def lost(number):
            if number == 3 and ranks.rank == 1:
                torch.save(None, Path(ranks.folder) / "result1.pt")
                while how == "hung" and not noticed.exists():
                    time.sleep(0.1)
                os._exit(0)
            return step(number)

        trainer.train_step = lost
        try:
            trainer.fit()
        except RuntimeError as error:
            noticed.touch()
            return str(error)
        raise AssertionError("nobody noticed")


@pytest.mark.goal("R11", "one process of two lost in a step")
@pytest.mark.parametrize("how", ["killed", pytest.param("hung", marks=pytest.mark.chaos)])
def test_the_others_notice_a_lost_process(tmp_path, row, how):
    assert run_ranks(2, lose_one, str(tmp_path), how)[0]
    row.count()
    row.outcome = f"{how}: the other ends with an error" + " (timeout 8 s)" * (how == "hung")
