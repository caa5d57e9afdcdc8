"""R2: whichever operation of a save fails, there is a whole checkpoint."""

from __future__ import annotations

import pytest

from chaos.failing_saves import SCENARIOS, fail_saves, list_audited, list_operations
from chaos.io_faults import DEADLY, FAULTS, TEARABLE, possible
from chaos.outcome_table import sizes

PER_JOB = 80
AUDITED = {
    "open": {"open", "os.open"}, "os.mkdir": {"mkdir"}, "os.rename": {"rename"},
    "os.remove": {"unlink"}, "os.rmdir": {"rmdir"}, "os.chmod": {"chmod"},
    "os.listdir": {"listdir"},
}  # fmt: skip


def cases_of(operations):
    """Every operation with every fault, failing once and, where it does not kill, from then on."""
    return [
        [*operation, fault, forever]
        for operation in operations
        for fault in FAULTS
        if possible(fault, operation[0])
        for forever in ((False,) if fault in DEADLY else (False, True))
    ]


@pytest.mark.goal("R2", "each operation of a save failed in turn")
@sizes(10, 0)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_there_is_always_a_whole_checkpoint(forks, data, tmp_path, row, scenario, times):
    folder, codes = str(tmp_path / "bench"), {}
    operations = forks.run(list_operations, folder=folder, data=str(data), scenario=scenario)
    assert operations.code == 0, operations.said
    calls = {call for call, _, _ in operations.value}
    assert calls >= {"mkdir", "save_file", "open", "write", "os.open", "fsync", "read", "rename"}
    assert ("rmdir" in calls) == bool(SCENARIOS[scenario])
    cases = cases_of(operations.value)
    if times:
        cases = cases[row.times :: max(1, len(cases) // times)]
    for first in range(0, len(cases), PER_JOB):
        some = cases[first : first + PER_JOB]
        end = forks.run(fail_saves, folder=folder, data=str(data), scenario=scenario, cases=some)
        assert end.code == 0, end.said
        for case, (code, found) in zip(some, end.value, strict=True):
            assert found == [], (case, code, found)
            codes[code] = codes.get(code, 0) + 1
            row.count()
    assert codes[0]
    assert codes[-9]
    assert codes[4]
    row.outcome = (
        f"{scenario} ({len(operations.value)} operations; {codes[0]} saved all the same, "
        f"{codes[4]} clean errors, {codes[-9]} killed): always a whole "
        "checkpoint, and the next save succeeds"
    )


def test_no_operation_is_overlooked(forks, data, tmp_path):
    """What Python's audit sees of a save, the harness sees too."""
    job = {"folder": str(tmp_path / "bench"), "data": str(data), "scenario": "the next checkpoint"}
    operations, audited = forks.run(list_operations, **job), forks.run(list_audited, **job)
    assert operations.code == audited.code == 0, operations.said + audited.said
    seen = {(call, path) for call, path, _ in operations.value}
    assert len(audited.value) > 20
    for event, path in audited.value:
        assert any((call, path) in seen for call in AUDITED[event]), (event, path)


@pytest.mark.goal("R2", "a disk that loses bytes and says nothing")
def test_lost_bytes_are_noticed(forks, data, tmp_path, row):
    """Once: written again. Always: a clean error, and the older checkpoint is there."""
    job = {"folder": str(tmp_path / "bench"), "data": str(data), "scenario": "the next checkpoint"}
    operations = forks.run(list_operations, **job).value
    written = [each for each in operations if each[0] in TEARABLE and each[0] != "read"]
    assert len(written) == 6  # three files of tensors, config, state, manifest
    cases = [[*each, "silently torn", forever] for each in written for forever in (False, True)]
    end = forks.run(fail_saves, **job, cases=cases)
    assert end.code == 0, end.said
    for case, (code, found) in zip(cases, end.value, strict=True):
        assert found == []
        assert (code == 0) == (not case[-1]), case
        row.count()
    row.outcome = "lost once: written again; lost each time: an error, the older one is whole"


@pytest.mark.goal("control", "a save that is broken on purpose, each operation failed")
@pytest.mark.parametrize(
    ("control", "finding"),
    [
        ("a checkpoint is written in place", "has its name and is damaged"),
        ("old checkpoints go first", "no checkpoint is left"),
    ],
)
def test_a_broken_save_is_caught(forks, data, tmp_path, row, control, finding):
    job = {"folder": str(tmp_path / "bench"), "data": str(data), "scenario": "the next checkpoint"}
    operations = forks.run(list_operations, **job, control=control).value
    cases = [[*each, "kill before", False] for each in operations if each[0] in TEARABLE][:12]
    end = forks.run(fail_saves, **job, cases=cases, control=control)
    assert end.code == 0, end.said
    caught = [found for _, found in end.value if any(finding in each for each in found)]
    row.count(len(caught))
    assert caught
    row.outcome = f"{control}: caught"
