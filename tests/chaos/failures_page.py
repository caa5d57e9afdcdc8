"""The table of ``docs/failures.md``: every row is made to happen, and says what it said then.

python tests/chaos/failures_page.py     # writes the table again
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "failures.md"
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))

from chaos import disk_limits, fork_jobs, small_run  # noqa: E402
from chaos.fork_client import Forks  # noqa: E402
from chaos.io_faults import FAULTS, Interposed  # noqa: E402
from chaos.lifetimes import live, reference  # noqa: E402
from chaos.nonfinite_steps import NONFINITE  # noqa: E402
from open_mythos.errors import MythosError  # noqa: E402
from open_mythos.train import Trainer  # noqa: E402
from open_mythos.train.checkpoint import saver as saving  # noqa: E402

_TABLE = re.compile(r"(<!-- ran: failures -->\n).*?(<!-- /ran -->)", re.DOTALL)


class Said(NamedTuple):
    """What a run said, and the exit code of its process."""

    text: str
    code: int | None
    """None: the run went on."""


@dataclass
class Place:
    """Where failures are made to happen."""

    forks: Forks
    data: Path
    finished: Path
    """Folder of a run that has ended; never changed."""
    folder: Path
    """Empty, and open to every user."""
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.folder / "run"

    def trainer(self, data: Path | None = None, **changes: Any) -> Trainer:
        return small_run.new_trainer(small_run.run_config(self.out, data or self.data, changes))

    def saved(self) -> Path:
        """The finished run as this one; returns the folder of its checkpoints."""
        shutil.copytree(self.finished, self.out)
        return self.out / "checkpoints"


def error_of(act: Callable[[], object]) -> Said:
    try:
        act()
    except MythosError as error:
        return Said(str(error), error.exit_code)
    raise AssertionError("nothing failed")


@contextmanager
def heard() -> Iterator[list[str]]:
    """The warnings of the library."""
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler = Handler(logging.WARNING)
    logging.getLogger("open_mythos").addHandler(handler)
    try:
        yield found
    finally:
        logging.getLogger("open_mythos").removeHandler(handler)


def killed(place: Place) -> Said:
    moment = {"phase": "save", "nth": 30, "signals": [signal.SIGKILL]}
    end = place.forks.run(live, out=str(place.out), data=str(place.data), moment=moment)
    return Said(end.said, end.code)


def stopped(place: Place) -> Said:
    moment = {"phase": "step", "nth": 9, "signals": [signal.SIGTERM]}
    end = place.forks.run(live, out=str(place.out), data=str(place.data), moment=moment)
    return Said(end.said[end.said.index("open-mythos: ") :], end.code)


def no_room(place: Place) -> Said:
    free = shutil.disk_usage(place.folder)._replace(free=200 << 10)
    with patch.object(saving.shutil, "disk_usage", lambda _: free):
        return error_of(place.trainer().fit)


def not_writable(whose: str) -> Callable[[Place], Said]:
    def provoke(place: Place) -> Said:
        job = {"out": str(place.folder), "data": str(place.data), "when": whose}
        facts = place.forks.run(disk_limits.no_permission, **job).value
        return Said(facts["error"], facts["code"])

    return provoke


def _failing(place: Place, call: str, fault: Any, file: str = "", warn: bool = False) -> Said:
    """A run in which every operation of a kind fails from the second save on."""
    trainer = place.trainer()
    on: list[bool] = []

    def decide(operation: Any) -> Any:
        hit = operation.call == call and operation.path.endswith(file)
        return fault if on and hit else None

    disk_limits.at_step(trainer, disk_limits.FULL_AT, lambda: on.append(True))
    with heard() as warnings, Interposed(place.out / "checkpoints", decide):
        if warn:
            trainer.fit()
            return Said(warnings[0], None)
        return error_of(trainer.fit)


def full(place: Place) -> Said:
    return _failing(place, "write", FAULTS["ENOSPC"], "state.json")


def loses_bytes(place: Place) -> Said:
    return _failing(place, "write", FAULTS["silently torn"], "state.json")


def old_one_stays(place: Place) -> Said:
    return _failing(place, "rmdir", FAULTS["EIO"], warn=True)


def full_once(place: Place) -> Said:
    trainer = place.trainer()
    failed: list[bool] = []

    def decide(operation: Any) -> Any:
        if operation.call == "write" and operation.path.endswith("state.json") and not failed:
            failed.append(True)
            return FAULTS["ENOSPC"]
        return None

    with heard() as warnings, Interposed(place.out / "checkpoints", decide):
        trainer.fit()
    return Said(warnings[0], None)


def _damage_newest(folder: Path) -> None:
    victim = folder / f"step_{small_run.STEPS:08d}" / "model.safetensors"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(bytes(content))


def damaged(place: Place) -> Said:
    _damage_newest(place.saved())
    with heard() as warnings:
        place.trainer().resume()
    return Said(warnings[0], None)


def damaged_strict(place: Place) -> Said:
    _damage_newest(place.saved())
    return error_of(lambda: place.trainer().resume(strict=True))


def none_whole(place: Place) -> Said:
    for path in place.saved().iterdir():
        (path / "state.json").unlink()
    return error_of(place.trainer().resume)


def not_readable(place: Place) -> Said:
    folder = place.saved()

    def denied(whole: Any, half: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    trainer = place.trainer()
    with Interposed(folder, lambda operation: denied if operation.call == "listdir" else None):
        return error_of(trainer.resume)


def other_settings(place: Place) -> Said:
    place.saved()
    trainer = place.trainer(optim={"lr": 0.5}, train={"seed": 1})
    return error_of(trainer.resume)


def other_data(place: Place) -> Said:
    place.saved()
    other = small_run.make_data(place.folder / "other", seed=1)
    return error_of(place.trainer(other).resume)


def a_run_is_there(place: Place) -> Said:
    place.saved()
    arguments = ["train", "--data.path", str(place.data), "--train.out_dir", str(place.out)]
    end = place.forks.run(fork_jobs.command, arguments=arguments)
    return Said(end.said, end.value)


def shard(damage: Callable[[Path], object]) -> Callable[[Place], Said]:
    def provoke(place: Place) -> Said:
        copy = shutil.copytree(place.data, place.folder / "tokens")
        trainer = place.trainer(copy)
        victims = sorted(copy.glob("train-*.tokens.bin"))
        disk_limits.at_step(trainer, 1, lambda: [damage(path) for path in victims])
        return error_of(trainer.fit)

    return provoke


def _without_its_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3])


def _of_no_vocabulary(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


def not_finite(place: Place) -> Said:
    lines: list[dict[str, Any]] = []

    class Logger:
        def log(self, step: int, metrics: Any) -> None:
            lines.append(dict(metrics))

    trainer = small_run.new_trainer(small_run.run_config(None, place.data), loggers=[Logger()])
    poison = NONFINITE["the loss"](trainer, float("nan"))
    disk_limits.at_step(trainer, 3, poison.__enter__)
    disk_limits.at_step(trainer, 4, lambda: poison.__exit__(None, None, None))
    trainer.fit()
    (line,) = (line for line in lines if line.get("skipped"))
    return Said(f'"loss": {line["loss"]}, "skipped": {line["skipped"]} (metrics)', None)


def diverged(place: Place) -> Said:
    trainer = place.trainer(train={"max_skips": 2})
    poison = NONFINITE["the loss"](trainer, float("nan"))
    disk_limits.at_step(trainer, disk_limits.FULL_AT, poison.__enter__)
    try:
        return error_of(trainer.fit)
    finally:
        poison.__exit__(None, None, None)


def no_metrics(place: Place) -> Said:
    trainer = place.trainer()
    file = place.out / "metrics.jsonl"
    disk_limits.at_step(trainer, 2, lambda: (file.unlink(), file.mkdir()))
    with heard() as warnings:
        trainer.fit()
    return Said(warnings[0], None)


class Failure(NamedTuple):
    """A row."""

    happened: str
    provoke: Callable[[Place], Said]
    do: str


_NOTHING = "nothing: the run goes on"
_RESUME = "`--resume latest`: the run goes on bit for bit"
FAILURES = (
    Failure(
        "The process is killed, or the machine loses power", killed,
        f"{_RESUME}. What was half written is ignored, and removed by the next save",
    ),
    Failure("SIGTERM or SIGINT: a scheduler, Ctrl-C", stopped, _RESUME),
    Failure(
        "There is too little room when a run starts", no_room,
        "free space, lower `train.keep`, or choose another `train.out_dir`",
    ),
    Failure(
        "The folder of the run cannot be written when it starts", not_writable("the run"),
        "fix its owner or permissions, or choose another `train.out_dir`",
    ),
    Failure(
        "The folder of its checkpoints cannot be written when it starts",
        not_writable("its checkpoints"),
        "fix its owner or permissions, or choose another `train.out_dir`",
    ),
    Failure(
        "A save fails once, as when a disk is full for a moment", full_once,
        f"{_NOTHING}; see what filled the disk",
    ),
    Failure(
        "A save fails twice: the disk is full, broken or has become read-only", full,
        f"free space, then {_RESUME}; steps since the last checkpoint are recomputed",
    ),
    Failure(
        "The disk takes a checkpoint and loses part of it, twice", loses_bytes,
        "check the disk; resume in a copy of the run's folder on another one",
    ),
    Failure(
        "An old checkpoint cannot be removed", old_one_stays,
        f"{_NOTHING}; remove `.unfinished-removed-...` by hand, it is no longer needed",
    ),
    Failure(
        "The newest checkpoint is damaged, `--resume latest`", damaged,
        "nothing: the run resumes from the previous checkpoint and recomputes the steps since",
    ),
    Failure(
        "The newest checkpoint is damaged, `--resume strict`", damaged_strict,
        "`--resume latest` falls back to the one before; or copy this one again",
    ),
    Failure(
        "Every checkpoint is damaged, or there is none", none_whole,
        "copy one from a backup; a new run needs another `train.out_dir`, it never starts silently",
    ),
    Failure(
        "The folder of the checkpoints cannot be read", not_readable,
        "fix its permissions; nothing is known to be damaged",
    ),
    Failure(
        "A run is resumed with other settings", other_settings,
        "give the saved values; `--allow optim.lr` takes a change on purpose",
    ),
    Failure(
        "A run is resumed with other data", other_data,
        "name the folder it was prepared in (it may have moved), or start a new run",
    ),
    Failure(
        "A run is started in the folder of another", a_run_is_there,
        "`--resume latest` to go on with it, or another `train.out_dir`",
    ),
    Failure(
        "A token shard disappears", shard(Path.unlink),
        f"put the file back, then {_RESUME}",
    ),
    Failure(
        "A token shard is cut short", shard(_without_its_end),
        f"put the file back, then {_RESUME}",
    ),
    Failure(
        "A token shard holds what no tokenizer gave", shard(_of_no_vocabulary),
        "`TokenShards(folder).verify()` finds every file that has changed since it was prepared",
    ),
    Failure(
        "A loss or gradient is not finite", not_finite,
        "nothing: the step is skipped; weights, optimizer state and averages do not change",
    ),
    Failure(
        "That goes on for more than `train.max_skips` steps, and rolling back did not help",
        diverged,
        "read the bundle it names; resume with a lower learning rate or other data",
    ),
    Failure(
        "Metrics cannot be written", no_metrics,
        f"{_NOTHING}; lines are missing from the metrics from there on",
    ),
)  # fmt: skip


def table(place_of: Callable[[int], Place]) -> str:
    """Make everything happen."""
    lines = ["| what happened | what it says | exit | what to do |", "|---|---|---:|---|"]
    for number, failure in enumerate(FAILURES):
        place = place_of(number)
        said = failure.provoke(place)
        code = {None: "goes on", -signal.SIGKILL: "killed"}.get(said.code, str(said.code))
        cells = (failure.happened, shown(said.text, place), code, failure.do)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def shown(text: str, place: Place) -> str:
    """The essence of a message: what, where, which value; the places of this machine left out."""
    text = text.removeprefix("open-mythos: ")
    for path, name in ((place.out, "RUN"), (place.folder / "tokens", "DATA"), (place.data, "DATA")):
        text = text.replace(str(path), name)
    text = re.sub(r"\b[\d,]+\.\d MiB\b", "N MiB", text)
    text = re.sub(r"'\d+ bytes'", "'N bytes'", text)
    text = re.sub(r"\b[0-9a-f]{16,}\b", "HASH", text)
    parts = []
    for line in text.splitlines():
        line = line.strip()
        if line and not line.startswith("to do:"):
            parts.append(f"`{re.sub(r' +', ' ', line)[:200]}`")
    return "<br>".join(parts) or "nothing"


@contextmanager
def places() -> Iterator[Callable[[int], Place]]:
    """Room for every failure, outside of any test."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "jobs").mkdir()
        with Forks(folder / "jobs") as forks:
            data = small_run.make_data(folder / "data")
            finished = reference(forks, data, folder / "finished").out
            yield lambda number: made(folder / str(number), forks, data, finished)


def made(folder: Path, forks: Forks, data: Path, finished: Path) -> Place:
    folder.mkdir()
    return Place(forks, data, finished, folder)


def page(rows: str) -> str:
    """The page with these rows."""
    return _TABLE.sub(lambda m: m[1] + rows + m[2], PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with places() as everywhere:
        PAGE.write_text(page(table(everywhere)), encoding="utf-8")
