"""R6: no room or permission: found out before the first step, or a clean stop."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import pytest

from chaos import disk_limits, small_run
from chaos.lifetimes import violations
from open_mythos.errors import EnvironmentError_
from open_mythos.train import Trainer

EXIT = EnvironmentError_.exit_code
FIRST = f"step_{small_run.SAVE_EVERY:08d}"
DEVICES = {
    "a full disk": disk_limits.disk_fills_up,
    "a limit on files": disk_limits.files_may_not_grow,
}


@pytest.fixture(scope="session")
def small_disk(forks):
    if not forks.run(disk_limits.small_disks_are_possible).value:
        pytest.skip("no file system can be mounted here")


@pytest.fixture
def open_folder():
    """Whose parents everybody may pass, unlike those of ``tmp_path``."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def before_the_first_step(end, *words):
    """A clean error, nothing trained, nothing left; returns the message."""
    assert end.code == 0, end.said
    facts = end.value
    assert facts["code"] == EXIT, facts
    assert all(word in facts["error"] for word in words), facts["error"]
    assert not facts.get("steps")
    assert facts["checkpoints"] == facts["others"] == []
    return facts["error"]


@pytest.mark.goal("R6", "too little room for the checkpoints that are kept")
def test_room_is_counted_before_the_first_step(forks, data, tmp_path, row, small_disk):
    end = forks.run(disk_limits.no_room_at_first, out=str(tmp_path / "disk"), data=str(data))
    said = "the disk has too little space for the checkpoints", "MiB free", "train.keep = 2"
    before_the_first_step(end, *said)
    row.outcome = "an error before the first step that says how much is missing"


@pytest.mark.goal("R6", "a file system that is read-only")
def test_read_only_before_the_first_step(forks, data, tmp_path, row, small_disk):
    end = forks.run(disk_limits.read_only_at_first, out=str(tmp_path / "disk"), data=str(data))
    before_the_first_step(end, "Read-only file system")
    row.outcome = "an error before the first step"


@pytest.mark.goal("R6", "a folder of somebody else")
@pytest.mark.parametrize("whose", ["the run", "its checkpoints"])
def test_no_permission_before_the_first_step(forks, data, open_folder, row, whose):
    end = forks.run(disk_limits.no_permission, out=str(open_folder), data=str(data), when=whose)
    before_the_first_step(end, "Permission denied")
    row.outcome = f"{whose}: an error before the first step"


def a_clean_stop(facts):
    """The run has stopped at its second save; the first one is there, and nothing else."""
    assert facts["code"] == EXIT, facts
    assert "the checkpoint could not be written" in facts["error"]
    assert facts["checkpoints"] == [FIRST]
    assert facts["half"] == []
    assert disk_limits.FULL_AT in facts["steps"]


@pytest.mark.goal("R6", "the room goes in the middle of a run")
@pytest.mark.parametrize("behind", [False, True], ids=["waiting", "behind"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_full_disk_is_a_clean_stop(forks, data, straight, tmp_path, row, device, behind, request):
    """And when there is room again, the run goes on to the same end."""
    if device == "a full disk":
        request.getfixturevalue("small_disk")
    job = {"out": str(tmp_path / "disk"), "data": str(data), "behind": behind, "helped": False}
    end = forks.run(DEVICES[device], **job)
    assert end.code == 0, end.said
    first, second = end.value
    a_clean_stop(first)
    assert first["others"] == []
    assert first["tries"] == 1 + 2  # the first save, the second one, the second one once more
    assert "retrying the save of step 6 after" in end.said
    assert second["code"] == 0, second
    assert second["end"] == straight.end
    row.outcome = f"{device}: tried twice, exit 4, older checkpoint whole; resumed bit for bit"


@pytest.mark.goal("R6", "the room goes, and comes back before the second try")
@pytest.mark.parametrize("device", DEVICES)
def test_the_second_try_saves_the_run(forks, data, straight, tmp_path, row, device, request):
    if device == "a full disk":
        request.getfixturevalue("small_disk")
    job = {"out": str(tmp_path / "disk"), "data": str(data), "behind": False, "helped": True}
    end = forks.run(DEVICES[device], **job)
    assert end.code == 0, end.said
    (facts,) = end.value
    assert facts["code"] == 0, facts
    assert facts["tries"] == 1 + small_run.STEPS // small_run.SAVE_EVERY
    assert facts["end"] == straight.end
    row.outcome = f"{device}: a warning, and the run goes on"


@pytest.mark.goal("R6", "writing is forbidden in the middle of a run")
@pytest.mark.parametrize("how", ["read-only", "no permission"])
def test_forbidden_later_is_a_clean_stop(forks, data, tmp_path, open_folder, row, how, request):
    if how == "read-only":
        request.getfixturevalue("small_disk")
        end = forks.run(disk_limits.becomes_read_only, out=str(tmp_path / "disk"), data=str(data))
    else:
        end = forks.run(
            disk_limits.no_permission, out=str(open_folder), data=str(data), when="later"
        )
    assert end.code == 0, end.said
    a_clean_stop(end.value)
    assert ("Read-only" if how == "read-only" else "Permission denied") in end.value["error"]
    row.outcome = f"{how}: exit 4, older checkpoint whole"


class Broken:
    """A logger whose server is down."""

    def log(self, step, metrics):
        raise ConnectionError("no route to host")


@pytest.mark.goal("R6", "metrics that cannot be written")
@pytest.mark.parametrize("how", ["a logger that raises", "a folder in the file's place"])
def test_metrics_never_stop_a_run(data, straight, tmp_path, caplog, row, how):
    run = small_run.run_config(tmp_path / "run", data)
    trainer = small_run.new_trainer(
        run, Trainer, [Broken()] if how == "a logger that raises" else []
    )
    small_run.Journal(tmp_path / "run").watch(trainer)
    if how == "a folder in the file's place":
        file = tmp_path / "run" / "metrics.jsonl"
        disk_limits.at_step(trainer, 2, lambda: (file.unlink(), file.mkdir()))
    with caplog.at_level(logging.WARNING):
        trainer.fit()
    assert violations(tmp_path / "run", small_run.fingerprint(trainer), straight) == []
    warnings = [r.getMessage() for r in caplog.records if "may lose metrics" in r.getMessage()]
    assert len(warnings) == 1
    row.outcome = f"{how}: one warning, the run equal bit for bit"


@pytest.mark.goal("control", "room that is not looked for first")
def test_without_the_look_steps_are_lost(forks, data, tmp_path, row, small_disk):
    """Otherwise the error above might come from the first save."""
    end = forks.run(
        disk_limits.no_room_at_first, out=str(tmp_path / "disk"), data=str(data), look=False
    )
    assert end.code == 0, end.said
    with pytest.raises(AssertionError):
        before_the_first_step(end, "the disk has too little space for the checkpoints")
    assert end.value["steps"]
    row.outcome = "no look before the first step: caught"


def test_leftovers_of_a_killed_run_are_room(data, tmp_path):
    """They are removed before the room is counted, and count as nothing."""
    run = small_run.run_config(tmp_path / "run", data)
    trainer = small_run.new_trainer(run)
    leftover = tmp_path / "run" / "checkpoints" / ".unfinished-step_00000003"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(bytes(1 << 20))
    trainer.saver.prepare(trainer.model, trainer.optimizer)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
