"""R5: told to stop, a run finishes its step, saves, exits with 75, and goes on as if never told."""

from __future__ import annotations

import io
import logging
import os
import random
import re
import signal

import pytest

from chaos import small_run
from chaos.injection_points import PHASES
from chaos.lifetimes import Story
from chaos.outcome_table import sizes
from open_mythos.train import PreemptedError, find_checkpoint
from open_mythos.train.signals import StopRequest

STOPPED = PreemptedError.exit_code
TOLD = (signal.SIGTERM, signal.SIGINT)
BEHIND = {"train": {"async_save": True}}


def where_it_stopped(story):
    """The step that it says; its newest checkpoint is of that step."""
    (step,) = re.findall(r"after step (\d+); a checkpoint was saved", story.end.said)
    assert find_checkpoint(story.out, strict=True).name == f"step_{int(step):08d}"
    assert small_run.read_journal(story.out)[-1]["step"] in (int(step) - 1, int(step))
    return int(step)


@pytest.mark.goal("R5", "SIGTERM or SIGINT at a moment of a phase")
@sizes(4, 20)
def test_at_moments_of_all_phases(forks, data, straight, tmp_path, row, times):
    rng, steps = random.Random(5), set()
    for i in range(times):
        phase = PHASES[1 + i % (len(PHASES) - 1)]
        # not in the last step, in which nothing is left to be stopped
        nth = rng.randrange(straight.before_last[phase])
        number = TOLD[i % 2]
        story = Story(forks, data, tmp_path / str(i), BEHIND if i % 3 == 2 else None)
        end = story.life({"phase": phase, "nth": nth, "signals": [number]})
        assert end.code == STOPPED, (phase, nth, end)
        assert number.name in end.said
        steps.add(where_it_stopped(story))
        assert story.finish(straight) == []
        row.count()
    row.outcome = f"exit 75 with a checkpoint ({len(steps)} different steps), resumed bit for bit"


@pytest.mark.goal("R5", "SIGTERM from outside, at a random time")
@sizes(2, 10)
def test_from_outside(forks, data, straight, tmp_path, row, times):
    rng, tried = random.Random(6), 0
    while row.times < times:
        tried += 1
        assert tried < 10 * times
        story = Story(forks, data, tmp_path / str(tried))
        after = rng.uniform(0, straight.seconds / 2)
        end = story.life(after=after, signal=signal.SIGTERM, since="begin")
        if end.code == 0:
            continue  # it was over before
        assert end.code == STOPPED, end
        where_it_stopped(story)
        assert story.finish(straight) == []
        row.count()
    row.outcome = "exit 75 with a checkpoint, resumed bit for bit"


@pytest.mark.goal("R5", "a second signal")
@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ((signal.SIGTERM, signal.SIGTERM), STOPPED),
        ((signal.SIGINT, signal.SIGTERM), STOPPED),
        ((signal.SIGTERM, signal.SIGINT), 130),
        ((signal.SIGINT, signal.SIGINT), 130),
    ],
    ids=["TERM-TERM", "INT-TERM", "TERM-INT", "INT-INT"],
)
def test_a_second_signal(forks, data, straight, tmp_path, row, signals, code):
    """A scheduler and a launcher both send SIGTERM; a second SIGINT is somebody who waits."""
    story = Story(forks, data, tmp_path / "run")
    moment = {"phase": "backward", "nth": straight.moments["backward"] // 2}
    end = story.life(moment | {"signals": [int(each) for each in signals]})
    assert end.code == code, end
    assert story.finish(straight) == []
    names = " then ".join(each.name for each in signals)
    row.outcome = f"{names}: exit {code}, resumed bit for bit"


class SignalsWhenWritten(io.RawIOBase):
    """A stream during whose writing a signal arrives."""

    def writable(self):
        return True

    def write(self, content):
        os.kill(os.getpid(), signal.SIGTERM)
        return len(content)


def test_a_signal_during_a_write_to_the_log():
    """A buffered stream cannot be entered twice: the handler must not write to it."""
    stream = io.TextIOWrapper(io.BufferedWriter(SignalsWhenWritten()), write_through=True)
    handler = logging.StreamHandler(stream)
    logging.getLogger("open_mythos").addHandler(handler)
    try:
        with StopRequest() as stop:
            stream.write("a line of the log\n")
            stream.flush()
        assert stop.received is signal.SIGTERM
    finally:
        logging.getLogger("open_mythos").removeHandler(handler)


def test_the_handlers_are_what_they_were():
    before = {number: signal.getsignal(number) for number in TOLD}
    with StopRequest() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received is signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
    assert {number: signal.getsignal(number) for number in TOLD} == before
