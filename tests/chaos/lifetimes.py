"""Start, kill and resume a run in forks, and compare it with an uninterrupted one."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos import small_run
from chaos.broken_variants import CONTROLS
from chaos.fork_client import End, Forks
from chaos.fork_server import begin
from chaos.injection_points import Moments, where_it_died
from open_mythos.errors import DataError
from open_mythos.run_folder import CHECKPOINTS_FOLDER
from open_mythos.train.checkpoint.find import checkpoints
from open_mythos.train.checkpoint.manifest import verify_checkpoint


def live(
    out: str,
    data: str,
    changes: Any = None,
    moment: dict[str, Any] | None = None,
    control: str = "",
) -> dict[str, Any]:
    """In a fork: start or resume the run and train to its end.

    Args:
        out: Its folder.
        data: The prepared folder.
        changes: Of its configuration.
        moment: ``phase`` and ``nth`` of a moment, and the ``signals`` that it then sends itself.
        control: Name of a defect to build in.

    Returns:
        The fingerprint of its end, and how many moments it had.
    """
    folder, moment = Path(out), moment or {}
    small_run.Journal(folder)  # the folder is there from the first moment on
    signals = moment.get("signals", [])
    moments = Moments(
        folder, moment.get("phase", ""), moment.get("nth"),
        lambda: [os.kill(os.getpid(), each) for each in signals],
    )  # fmt: skip
    trainer = small_run.new_trainer(small_run.run_config(folder, data, changes))
    with CONTROLS[control](trainer) if control else nullcontext():
        if small_run.has_checkpoint(folder):
            trainer.resume()
        small_run.Journal(folder).watch(trainer)
        with moments.watch(trainer):
            begin()
            trainer.fit()
    return {
        "end": small_run.fingerprint(trainer),
        "moments": dict(moments.counts),
        "before_last": moments.before_last,
    }


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run."""

    journal: dict[tuple[int, str], dict[str, Any]]
    """(step, depths if it is an evaluation) -> what was computed."""
    end: dict[str, Any]
    """Fingerprint."""
    moments: dict[str, int]
    """How many of each phase there are."""
    before_last: dict[str, int]
    """How many of them come before the last step."""
    seconds: float
    """From the fork to the end."""
    out: Path
    """Its folder."""


def reference(forks: Forks, data: Path, folder: Path, changes: Any = None) -> Reference:
    """Run it."""
    out = folder / "run"
    start = time.perf_counter()
    end = forks.run(live, out=str(out), data=str(data), changes=changes)
    seconds = time.perf_counter() - start
    assert end.code == 0, end.said
    lines = small_run.read_journal(out)
    journal = {_key(line): line for line in lines}
    assert len(journal) == len(lines)
    assert sum(not depths for _, depths in journal) == small_run.STEPS
    value = end.value
    return Reference(journal, value["end"], value["moments"], value["before_last"], seconds, out)


def _key(line: dict[str, Any]) -> tuple[int, str]:
    return line["step"], str(line.get("evaluated", ""))


def violations(out: Path, end: Any, straight: Reference) -> list[str]:
    """List how a finished run differs from the uninterrupted one.

    Args:
        out: Its folder, with what all its lives have computed.
        end: Fingerprint of its end.
        straight: The other one.
    """
    found = []
    for line in small_run.read_journal(out):
        expected = straight.journal.get(_key(line))
        if line != expected:
            names = [n for n in line if expected is None or line[n] != expected.get(n)]
            found.append(f"step {line['step']}: {', '.join(names)}")
    missing = straight.journal.keys() - {_key(line) for line in small_run.read_journal(out)}
    found += [f"step {step} was never computed" for step, _ in sorted(missing)]
    for part in ("state", "data"):
        if end[part] != straight.end[part]:
            found.append(f"{part} at the end: {end[part]}")
    names = straight.end["tensors"]
    for name in sorted(names.keys() | end["tensors"].keys()):
        if names.get(name) != end["tensors"].get(name):
            found.append(f"{name} at the end")
    return found + half_checkpoints(out)


def half_checkpoints(out: Path) -> list[str]:
    """List checkpoints that have their final name and are incomplete."""
    found = []
    for path in checkpoints(out / CHECKPOINTS_FOLDER):
        try:
            verify_checkpoint(path)
        except DataError as error:
            found.append(f"{path.name} has its name and is damaged: {error.where}")
    return found


class Story:
    """The processes of one run, one after another, and what was wrong in them."""

    def __init__(
        self, forks: Forks, data: Path, out: Path, changes: Any = None, control: str = ""
    ) -> None:
        self.forks, self.data, self.out = forks, data, out
        self.changes, self.control = changes, control
        self.deaths: Counter[str] = Counter()
        self.found: list[str] = []
        self.end: End | None = None

    def life(self, moment: dict[str, Any] | None = None, **sending: Any) -> End:
        """Run one process until it ends or is killed."""
        had = small_run.has_checkpoint(self.out)
        self.end = end = self.forks.run(
            live, out=str(self.out), data=str(self.data), changes=self.changes,
            control=self.control, moment=moment, **sending,
        )  # fmt: skip
        if end.code < 0:
            self.deaths[where_it_died(self.out)] += 1
        self.found += half_checkpoints(self.out)
        if had and not small_run.has_checkpoint(self.out):
            self.found.append("a checkpoint existed, and none does")
        return end

    def finish(self, straight: Reference) -> list[str]:
        """Run to the end; return what was wrong."""
        if self.end is None or self.end.code != 0:
            self.life()
        assert self.end is not None
        if self.end.code != 0:
            return [*self.found, f"the last life ended with {self.end.code}: {self.end.said}"]
        return self.found + violations(self.out, self.end.value["end"], straight)


def random_kills(
    story: Story, rng: random.Random, most: int, straight: Reference
) -> tuple[int, list[str]]:
    """Kill a run up to ``most`` times at random moments, then let it end.

    Returns:
        How many kills there were, and what was wrong.
    """
    kills = 0
    # half a run on average: most lives get to a checkpoint, few to the end
    while kills < most:
        if story.life(after=rng.uniform(0, straight.seconds)).code == 0:
            break
        kills += 1
    return kills, story.finish(straight)
