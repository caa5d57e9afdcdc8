"""Places where nothing, or not enough, can be written; jobs, for they change their process."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from chaos import small_run
from chaos.failing_saves import in_a_fork
from chaos.lifetimes import half_checkpoints
from open_mythos.errors import MythosError
from open_mythos.run_folder import CHECKPOINTS_FOLDER
from open_mythos.train import Trainer
from open_mythos.train.checkpoint import saver as saving
from open_mythos.train.checkpoint.find import checkpoints

NOBODY = 65534
FULL_AT = 4
"""Number of the step at which the room is taken away: after the first save, before the second."""
_NEW_NAMESPACE, _NEW_USER = 0x00020000, 0x10000000
_READ_ONLY, _REMOUNT = 1, 32


def small_disks_are_possible() -> bool:
    """In a fork: whether a file system of its own can be mounted here."""
    if sys.platform != "linux":
        return False
    with tempfile.TemporaryDirectory() as folder:
        return in_a_fork(lambda: mount(Path(folder), "64k")) == 0


def mount(folder: Path, size: str) -> None:
    """Give this process, and no other, a file system of ``size`` at ``folder``."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    _check(libc.unshare(_NEW_NAMESPACE | (_NEW_USER if user else 0)))
    if user:  # root of a name space of its own, in which it is itself outside
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _check(libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None))  # private, all of it
    _check(libc.mount(b"none", bytes(folder), b"tmpfs", 0, f"size={size}".encode()))


def make_read_only(folder: Path) -> None:
    """Forbid every write to the file system at ``folder``."""
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.mount(b"none", bytes(folder), None, _REMOUNT | _READ_ONLY, None))


def _check(code: int) -> None:
    if code:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Facts:
    """What came of the lives of a run in a place that others cannot see."""

    def __init__(self, out: Path, data: Path | str, changes: Any = None) -> None:
        self.out, self.data, self.changes = out, data, changes
        self.facts: dict[str, Any] = {"error": None, "code": 0, "end": None}

    def life(self, prepare: Callable[[Trainer], None] = lambda trainer: None) -> dict[str, Any]:
        """Live as far as it goes, and say how far that was."""
        try:
            trainer = small_run.new_trainer(small_run.run_config(self.out, self.data, self.changes))
            if small_run.has_checkpoint(self.out):
                trainer.resume()
            steps = []
            plain = trainer.train_step
            trainer.train_step = lambda step: steps.append(step) or plain(step)
            self.facts["steps"] = steps
            prepare(trainer)
            trainer.fit()
            self.facts |= {"error": None, "code": 0, "end": small_run.fingerprint(trainer)}
        except MythosError as error:
            self.facts |= {"error": str(error), "code": error.exit_code}
        folder = self.out / CHECKPOINTS_FOLDER
        return self.facts | {
            "checkpoints": [path.name for path in checkpoints(folder)],
            "half": half_checkpoints(self.out),
            "others": sorted(
                path.name
                for path in (folder.iterdir() if folder.is_dir() else ())
                if not path.name.startswith("step_")
            ),
        }


def at_step(trainer: Trainer, number: int, act: Callable[[], None]) -> None:
    """``act`` when the batch of step ``number`` is fetched."""
    fetch = trainer.loader.next_batch

    def next_batch(step: int) -> Any:
        if step == number:
            act()
        return fetch(step)

    trainer.loader.next_batch = next_batch


def no_room_at_first(out: str, data: str, look: bool = True) -> dict[str, Any]:
    """A disk that holds the first checkpoint, but not those that are kept."""
    folder = Path(out)
    folder.mkdir()
    mount(folder, "512k")
    facts = Facts(folder / "run", data)
    if look:
        return facts.life()
    with patch.object(saving.Saver, "prepare", lambda *_: None):
        return facts.life()


def disk_fills_up(out: str, data: str, behind: bool, helped: bool) -> list[dict[str, Any]]:
    """Another program takes all room; after the error, or after the first try, it gives it back."""
    folder = Path(out)
    folder.mkdir()
    mount(folder, "64m")
    ballast = folder / "ballast"

    def fill() -> None:
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    return _room_goes(
        Facts(folder / "run", data, {"train": {"async_save": behind}}), fill, ballast.unlink, helped
    )


def files_may_not_grow(out: str, data: str, behind: bool, helped: bool) -> list[dict[str, Any]]:
    """The same without a file system: the process may not write long files any more."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    return _room_goes(
        Facts(Path(out), data, {"train": {"async_save": behind}}),
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096 * 4, limits[1])),
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
        helped,
    )


def _room_goes(
    facts: Facts, take: Callable[[], None], give: Callable[[], None], helped: bool
) -> list[dict[str, Any]]:
    plain, tries = saving.write_checkpoint, []

    def write(*args: Any) -> Path:
        tries.append(1)
        try:
            return plain(*args)
        except MythosError:
            if helped:
                give()
            raise

    with patch.object(saving, "write_checkpoint", write):
        first = facts.life(lambda trainer: at_step(trainer, FULL_AT, take))
    first["tries"] = len(tries)
    if helped:
        return [first]
    give()
    return [json.loads(json.dumps(first)), facts.life()]


def read_only_at_first(out: str, data: str) -> dict[str, Any]:
    """A file system on which nothing can be written, ever."""
    folder = Path(out)
    folder.mkdir()
    mount(folder, "64m")
    make_read_only(folder)
    return Facts(folder / "run", data).life()


def becomes_read_only(out: str, data: str) -> dict[str, Any]:
    """As the kernel does it with a disk that fails."""
    folder = Path(out)
    folder.mkdir()
    mount(folder, "64m")
    act = lambda: make_read_only(folder)  # noqa: E731
    return Facts(folder / "run", data).life(lambda trainer: at_step(trainer, FULL_AT, act))


def no_permission(out: str, data: str, when: str) -> dict[str, Any]:
    """Somebody else's folder: of the run, of its checkpoints, or of these from some step on.

    Root may do everything, so as root this becomes somebody who may not.
    """
    folder, run = Path(out), Path(out) / "run"
    mine = run / CHECKPOINTS_FOLDER
    mine.mkdir(parents=True)
    shutil.copytree(data, folder / "data")
    closed = {"the run": run, "its checkpoints": mine}.get(when)
    if os.geteuid() == 0:
        for path in {run, mine} - {closed}:
            os.chown(path, NOBODY, NOBODY)
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    elif closed is not None:
        closed.chmod(0o555)
    act = lambda: mine.chmod(0o555)  # noqa: E731
    return Facts(run, folder / "data").life(
        lambda trainer: at_step(trainer, FULL_AT, act) if when == "later" else None
    )
