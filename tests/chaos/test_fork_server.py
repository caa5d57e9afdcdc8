"""The harness leaves nothing behind and mistakes nothing."""

from __future__ import annotations

import os
import signal

import pytest

from chaos import fork_jobs
from chaos.fork_client import Forks


def test_a_job_gives_its_value_and_its_message(forks):
    end = forks.run(fork_jobs.give, value={"a": [1]})
    assert (end.code, end.value, end.sent) == (0, {"a": [1]}, False)
    end = forks.run(fork_jobs.refuse)
    assert end.code == 4
    assert end.said.startswith("open-mythos: it cannot be done\n")
    assert end.value is None
    assert "ZeroDivisionError" in forks.run(fork_jobs.fail).said


def test_a_signal_after_a_time(forks):
    assert forks.run(fork_jobs.wait_for_ever, after=0.05).code == -signal.SIGKILL
    end = forks.run(fork_jobs.wait_for_ever, after=0.05, signal=signal.SIGTERM, since="begin")
    assert end.code == -signal.SIGTERM
    assert end.sent


def test_a_job_that_never_ends_is_an_error(forks, monkeypatch):
    monkeypatch.setattr("chaos.fork_client.LIMIT", 0.2)
    with pytest.raises(AssertionError, match="hung"):
        forks.run(fork_jobs.wait_for_ever)


@pytest.mark.parametrize("how", ["the server is killed", "whoever asked has gone"])
def test_no_job_is_left_behind(tmp_path, how):
    """A pipe that only the job holds open tells when it has gone."""
    reading, writing = os.pipe()
    server = Forks(tmp_path, keep=(writing,), warm=False)
    os.close(writing)
    server.start(fork_jobs.hold, descriptor=writing)
    assert os.read(reading, 1) == b"h"
    if how == "the server is killed":
        os.kill(server.pid, signal.SIGKILL)
    server.close()
    assert os.read(reading, 1) == b""  # returns when the last holder is gone, not before
    os.close(reading)
