"""Saves a run: checks room and permissions first, writes in the foreground or in the background,
retries once.

A background save takes a copy of everything and writes it in a thread. There is at most one in
flight: the next save, and the end of the run, wait for it. Its error is raised at the next step.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
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
"""Tensors of a parameter's size that an optimizer may keep for it: the two moments of AdamW."""
_PROBE = f"{UNFINISHED}probe"
_MIB = 1 << 20


class Saver:
    """Writes the checkpoints of a run; used in ``with``, around the training.

    In a process group every process has one, and calls it when the others do.

    Args:
        directory: Their folder.
        keep: Checkpoints that stay.
        background: Write in a thread, unless :meth:`save` is told to wait. A copy of the checkpoint
            is held in host memory meanwhile.
    """

    def __init__(self, directory: str | Path, keep: int, background: bool = False) -> None:
        self.directory, self.keep, self.background = Path(directory), keep, background
        self._pending: Future[Path] | None = None
        # its own, so that a background save never gets in between the collectives of training
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None

    def prepare(
        self, model: Model, optimizer: torch.optim.Optimizer, extra: Extra | None = None
    ) -> None:
        """Find out before the first step whether its checkpoints can be written.

        There must be room for ``keep`` checkpoints and the one being written, less those that are
        there already.

        Raises:
            EnvironmentError_: There is not enough room, or the folder cannot be written.
        """

        def prepare() -> None:
            if rank() == 0:
                self._prepare(model, optimizer, extra)

        together(self._group, self.directory, prepare)

    def _prepare(self, model: Model, optimizer: torch.optim.Optimizer, extra: Extra | None) -> None:
        self._try_to_write()
        size = checkpoint_bytes(model, optimizer, extra)
        there = min(self.keep, len(checkpoints(self.directory)))
        more = self.keep + 1 - there
        free = shutil.disk_usage(self.directory).free
        if free < more * size:
            raise EnvironmentError_(
                "there is no room for the checkpoints", where=str(self.directory),
                value=f"{free / _MIB:,.1f} MiB free",
                allowed=f"at least {more * size / _MIB:,.1f} MiB: {more} more of "
                f"{size / _MIB:,.1f} MiB (train.keep = {self.keep}, one being written, "
                f"{there} there)",
                fix="make room, lower train.keep, or choose another train.out_dir",
            )  # fmt: skip

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
        """Save this moment; the arguments are those of :func:`take_snapshot`.

        A save that fails is retried once.

        Args:
            step: Optimizer steps done.
            model: Its weights.
            optimizer: Its state.
            state: JSON-ready.
            extra: Further tensors.
            wait: Return when the checkpoint is on the disk, whatever ``background`` says. Needed
                for the last save of a process.

        Returns:
            The checkpoint's folder; in the background it is not there yet.

        Raises:
            EnvironmentError_: This save, or the one before it, could not be written, or does not
                read as it was written.
        """
        self.wait()
        behind = self.background and not wait
        snapshot = take_snapshot(step, model, optimizer, state, extra=extra, copy=behind)
        if not behind:
            return self._write(snapshot)
        pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending = pool.submit(self._write, snapshot)
        pool.shutdown(wait=False)  # takes no more; what it has is finished, also at exit
        return self.directory / f"step_{step:08d}"

    @property
    def failed(self) -> bool:
        """Whether a background save has ended with an error, which :meth:`wait` raises."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def wait(self) -> None:
        """Wait for the save under way, if there is one; raises as :meth:`save`."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except (EnvironmentError_, DataError) as lost:
            if error is None:
                raise
            logger.error("a checkpoint was lost besides:\n%s", lost)

    def _write(self, snapshot: Snapshot) -> Path:
        try:
            return write_checkpoint(self.directory, snapshot, self.keep, self._group)
        except (EnvironmentError_, DataError) as error:
            logger.warning("saving step %d once more after this:\n%s", snapshot.step, error)
        return write_checkpoint(self.directory, snapshot, self.keep, self._group)

    def _try_to_write(self) -> None:
        """Do what a save does with a folder, once, with a few bytes."""
        first, second = self.directory / _PROBE, self.directory / f"{_PROBE}-renamed"
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
                fix="fix the permissions, make room, or choose another train.out_dir",
            ) from error  # fmt: skip
        finally:
            for leftover in (first, second):
                shutil.rmtree(leftover, ignore_errors=True)


def checkpoint_bytes(
    model: Model, optimizer: torch.optim.Optimizer, extra: Extra | None = None
) -> int:
    """Return the bytes of a checkpoint's tensors, with optimizer state that does not exist yet.

    Args:
        model: Its weights.
        optimizer: A parameter that it keeps nothing of yet counts for :data:`MOMENTS`.
        extra: Further tensors that are saved.
    """
    files = stored_tensors(model, optimizer, extra).values()
    now = sum(each.nbytes for tensors in files for each in tensors.values())
    trained = (each for group in optimizer.param_groups for each in group["params"])
    return now + sum(MOMENTS * each.nbytes for each in trained if not optimizer.state.get(each))
