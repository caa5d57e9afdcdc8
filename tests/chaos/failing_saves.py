"""Saves of which one operation fails, and what is left of them."""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chaos import small_run
from chaos.broken_variants import CONTROLS
from chaos.fork_server import die_with_the_server
from chaos.io_faults import DEADLY, FAULTS, TEARABLE, Fault, Interposed, Operation
from chaos.lifetimes import half_checkpoints
from open_mythos.errors import DataError, EnvironmentError_, MythosError
from open_mythos.train import find_checkpoint
from open_mythos.train.checkpoint.saver import Saver

NEW = 2
"""Number of the step whose save fails."""
SCENARIOS = {
    "the first checkpoint": [],
    "the next checkpoint": [(1, False)],
    "once more over a whole one": [(NEW, False)],
    "once more over a damaged one": [(1, False), (NEW, True)],
}
"""Name -> (step, damaged) of the checkpoints that are there. One is kept, so nothing is spare."""

Case = list[Any]
"""[call, path, number, fault, whether everything fails from there on]"""


class Bench:
    """Two moments of a run, to be saved over each other.

    Args:
        folder: For all that is written.
        data: The prepared folder.
        scenario: Which checkpoints there are.
    """

    def __init__(self, folder: Path, data: str, scenario: str) -> None:
        self.folder, self.scenario = folder, SCENARIOS[scenario]
        self.trainer = small_run.new_trainer(small_run.run_config(None, data))
        self.trainer.train_step(0)
        shutil.rmtree(folder, ignore_errors=True)
        for step, damage in self.scenario:
            path = self.save(folder / "before", step, keep=9)
            if damage:
                with (path / "model.safetensors").open("r+b") as file:
                    file.write(b"damage")
        (folder / "before").mkdir(parents=True, exist_ok=True)
        self.trainer.train_step(1)
        self.before = {path.name: _weights(path) for path in (folder / "before").iterdir()}
        self.after = _weights(self.save(folder / "after", NEW))

    def save(self, folder: Path, step: int, keep: int = 1) -> Path:
        """As the trainer does."""
        trainer = self.trainer
        state = {"train": asdict(trainer.state), "data": trainer.loader.state_dict()}
        extra = {"average.safetensors": small_run.averages(trainer).state_dict()}
        return Saver(folder, keep).save(step, trainer.model, trainer.optimizer, state, extra=extra)

    def fresh(self) -> Path:
        """A folder with the checkpoints of the scenario."""
        folder = self.folder / "run" / "checkpoints"
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(self.folder / "before", folder))

    def operations(self) -> list[Operation]:
        """Those of a save to which nothing happens."""
        seen: list[Operation] = []
        folder = self.fresh()
        with Interposed(folder, lambda operation: seen.append(operation)):
            self.save(folder, NEW)
        return seen

    def outcome(self, case: Case) -> tuple[int, list[str]]:
        """Let one operation fail; returns the exit code and what was wrong afterwards."""
        *key, fault, forever = case
        folder = self.fresh()
        code = in_a_fork(
            lambda: self._save_failing(folder, Operation(*key), FAULTS[fault], forever)
        )
        found = [each for each in half_checkpoints(folder.parent) if not self._was_damaged(folder)]
        expected = (-9,) if fault in DEADLY else (0, EnvironmentError_.exit_code)
        if code not in expected and not (code == 0 and fault in DEADLY):
            found.append(f"ended with {code}")
        whole = [path.name for path in folder.iterdir() if path.name.startswith("step_")]
        if code == 0 and f"step_{NEW:08d}" not in whole:
            found.append("said that it had saved, and has not")
        if self.scenario or whole:
            found += self._what_is_found(folder)
        self.save(folder, NEW + 1)
        if [path.name for path in folder.iterdir()] != [f"step_{NEW + 1:08d}"]:
            found.append(f"after the next save: {sorted(os.listdir(folder))}")
        return code, found

    def _save_failing(self, folder: Path, target: Operation, fault: Fault, forever: bool) -> None:
        failing: list[Operation] = []

        def decide(operation: Operation) -> Fault | None:
            if operation == target or (forever and failing):
                failing.append(operation)
                # an operation that is not torn and says nothing is one that succeeds
                silent = fault is FAULTS["silently torn"]
                return None if silent and operation.call not in TEARABLE else fault
            return None

        with Interposed(folder, decide):
            self.save(folder, NEW)

    def _was_damaged(self, folder: Path) -> bool:
        """Whether the scenario's damaged checkpoint is as it was."""
        (name,) = [f"step_{step:08d}" for step, damage in self.scenario if damage] or [""]
        return bool(name) and _weights(folder / name) == self.before[name]

    def _what_is_found(self, folder: Path) -> list[str]:
        try:
            path = find_checkpoint(folder)
        except DataError as error:
            return [f"no checkpoint is left: {error.value}"]
        was = self.before.get(path.name.removesuffix(".old"))
        return [] if _weights(path) in (was, self.after) else [f"{path.name} is of another moment"]


def fail_saves(
    folder: str, data: str, scenario: str, cases: list[Case], control: str = ""
) -> list[tuple[int, list[str]]]:
    """In a fork: the outcomes of ``cases``."""
    bench = Bench(Path(folder), data, scenario)
    with CONTROLS[control](bench.trainer) if control else nullcontext():
        return [bench.outcome(case) for case in cases]


def list_operations(folder: str, data: str, scenario: str, control: str = "") -> list[Operation]:
    """In a fork: the operations of a save."""
    bench = Bench(Path(folder), data, scenario)
    with CONTROLS[control](bench.trainer) if control else nullcontext():
        return bench.operations()


def list_audited(folder: str, data: str, scenario: str) -> list[list[str]]:
    """In a fork: what Python's own audit sees of a save, as (event, path in the folder).

    An audit hook cannot be taken away again, so a process of its own is needed.
    """
    bench = Bench(Path(folder), data, scenario)
    inside, seen, listening = bench.fresh(), [], [True]
    names = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.listdir"}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if listening and event in names and isinstance(arguments[0], str | os.PathLike):
            path = os.path.abspath(arguments[0])
            if (path + os.sep).startswith(str(inside) + os.sep):
                seen.append([event, os.path.relpath(path, inside)])

    sys.addaudithook(hook)
    bench.save(inside, NEW)
    listening.clear()
    return seen


def in_a_fork(act: Callable[[], Any]) -> int:
    """The exit code of a process that does ``act``; nothing of it is left."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    die_with_the_server()
    code = 1
    try:
        act()
        code = 0
    except MythosError as error:
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _weights(path: Path) -> bytes:
    return (path / "model.safetensors").read_bytes()
