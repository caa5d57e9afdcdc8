"""Save a run: check space and permissions before training, write in the foreground or background.

A background save copies everything and writes it in a thread. At most one is in flight: the next
save and the end of the run wait for it. Its error is raised after the following step.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from open_mythos.distributed import rank, world_size
from open_mythos.errors import DataError, EnvironmentError_
from open_mythos.files import sync_to_disk
from open_mythos.train.build import Model
from open_mythos.train.checkpoint.find import checkpoints
from open_mythos.train.checkpoint.snapshot import Extra, Snapshot, stored_tensors, take_snapshot
from open_mythos.train.checkpoint.write import (
    UNFINISHED,
    make_folder,
    remove_unfinished,
    together,
    write_checkpoint,
)

logger = logging.getLogger(__name__)

MOMENTS = 2
"""Most tensors of a parameter's size in its optimizer state: the two moments of AdamW."""
_MIB = 1 << 20


class Saver:
    """Context manager that writes the newest ``keep`` checkpoints of a run into ``directory``.

    Every process has one, and all call it together. With ``background``, a thread writes from a
    copy in host memory.
    """

    def __init__(self, directory: str | Path, keep: int, background: bool = False) -> None:
        self.directory, self.keep, self.background = Path(directory), keep, background
        self._pending: Future[Path] | None = None
        # a separate group: a background save must not interleave with collectives of training
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None

    def prepare(
        self, model: Model, optimizer: torch.optim.Optimizer, extra: Extra | None = None
    ) -> None:
        """Check before the first step that checkpoints can be written.

        The disk must have space for ``keep`` checkpoints and one being written, minus the existing
        ones.

        Raises:
            EnvironmentError_: The disk has too little space, or the folder cannot be written.
        """

        def prepare() -> None:
            if rank() == 0:
                self._probe_folder()
                self._check_space(_checkpoint_bytes(model, optimizer, extra))

        together(self._group, self.directory, prepare)

    def save(
        self,
        step: int,
        model: Model,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
        *,
        extra: Extra | None = None,
        wait: bool = True,
    ) -> Path:
        """Save a checkpoint, see :func:`take_snapshot`; retry once if that fails.

        With ``wait``, which the last save of a process requires, write in the foreground. Returns
        the folder, which a background save has not created yet.

        Raises:
            EnvironmentError_: This save or the previous one could not be written, or does not read
                back as it was written.
        """
        self.wait()
        background = self.background and not wait
        snapshot = take_snapshot(step, model, optimizer, state, extra=extra, copy=background)
        if not background:
            return self._write(snapshot)
        pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending = pool.submit(self._write, snapshot)
        pool.shutdown(wait=False)  # accepts no more jobs; the pending one finishes, even at exit
        return self.directory / snapshot.name

    @property
    def failed(self) -> bool:
        """Whether a background save has failed; :meth:`wait` raises its error."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def wait(self) -> None:
        """Wait for the save in flight, if any; raises as :meth:`save`."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self.wait()
        except (EnvironmentError_, DataError) as failure:
            if error is None:
                raise
            logger.error("a checkpoint could not be saved either:\n%s", failure)

    def _write(self, snapshot: Snapshot) -> Path:
        try:
            return write_checkpoint(self.directory, snapshot, self.keep, self._group)
        except (EnvironmentError_, DataError) as error:
            logger.warning("retrying the save of step %d after:\n%s", snapshot.step, error)
        return write_checkpoint(self.directory, snapshot, self.keep, self._group)

    def _check_space(self, size: int) -> None:
        present = min(self.keep, len(checkpoints(self.directory)))
        more = self.keep + 1 - present
        free = shutil.disk_usage(self.directory).free
        if free < more * size:
            raise EnvironmentError_(
                "the disk has too little space for the checkpoints", where=str(self.directory),
                value=f"{free / _MIB:,.1f} MiB free",
                allowed=f"at least {more * size / _MIB:,.1f} MiB: {more} more of "
                f"{size / _MIB:,.1f} MiB (train.keep = {self.keep}, one being written, "
                f"{present} present)",
                fix="free space, lower train.keep, or choose another train.out_dir",
            )  # fmt: skip

    def _probe_folder(self) -> None:
        """Perform every file operation of a save once, with a few bytes."""
        first = self.directory / f"{UNFINISHED}probe"
        second = first.with_name(f"{first.name}-renamed")
        try:
            make_folder(self.directory)
            remove_unfinished(self.directory)
            first.mkdir()
            (first / "file").write_bytes(b"\0" * 4096)
            sync_to_disk(first / "file")
            first.rename(second)
            sync_to_disk(self.directory)
            shutil.rmtree(second)
        except OSError as error:
            raise EnvironmentError_(
                "checkpoints cannot be written", where=str(self.directory), value=str(error),
                allowed="a folder with space that can be written",
                fix="fix the permissions, free space, or choose another train.out_dir",
            ) from error  # fmt: skip
        finally:
            for leftover in (first, second):
                shutil.rmtree(leftover, ignore_errors=True)


def _checkpoint_bytes(model: Model, optimizer: torch.optim.Optimizer, extra: Extra | None) -> int:
    """Return the bytes of a checkpoint, with optimizer state that does not exist yet."""
    files = stored_tensors(model, optimizer, extra).values()
    now = sum(each.nbytes for tensors in files for each in tensors.values())
    trained = (each for group in optimizer.param_groups for each in group["params"])
    return now + sum(MOMENTS * each.nbytes for each in trained if not optimizer.state.get(each))
