"""R5 through the command line: the exit codes are those of the process."""

from __future__ import annotations

import re

import pytest
import yaml

from chaos import fork_jobs, small_run
from open_mythos.train import find_checkpoint


@pytest.fixture
def arguments(data, tmp_path):
    """Of ``open-mythos train``."""

    def made(name, *more):
        run = small_run.run_config(tmp_path / name, data)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(run.to_dict()))
        return ["train", "--config", str(path), "--quiet", *more]

    return made


def weights(folder):
    return (find_checkpoint(folder, strict=True) / "model.safetensors").read_bytes()


@pytest.mark.goal("R5", "`open-mythos train`, SIGTERM, `--resume latest`")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_stopped_and_resumed(forks, arguments, tmp_path, row, name):
    assert forks.run(fork_jobs.command, arguments=arguments("straight")).value == 0
    end = forks.run(fork_jobs.command, arguments=arguments("run"), at=4, send=name)
    assert (end.code, end.value) == (0, 75), end.said
    assert re.search(rf"open-mythos: stopped by {name} after step 5; a checkpoint", end.said)
    again = arguments("run", "--resume", "latest")
    assert forks.run(fork_jobs.command, arguments=again).value == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")
    row.outcome = f"{name}: exit 75, then exit 0 with equal weights"


@pytest.mark.goal("R12", "`open-mythos train --resume latest` with other settings, or none")
def test_rejections_have_their_exit_codes(forks, arguments, tmp_path, row):
    assert (
        forks.run(fork_jobs.command, arguments=arguments("run"), at=4, send="SIGTERM").value == 75
    )
    cases = [
        (arguments("run"), 2, "the folder holds a run"),
        (arguments("run", "--resume", "latest", "--optim.lr", "0.5"), 2, "optim.lr: saved"),
        (arguments("new", "--resume", "latest"), 3, "there is no checkpoint to resume from"),
    ]
    for given, code, said in cases:
        end = forks.run(fork_jobs.command, arguments=given)
        assert end.value == code, end.said
        assert said in end.said
        row.count()
    row.outcome = "exit 2 or 3 with the reason, nothing trained"
