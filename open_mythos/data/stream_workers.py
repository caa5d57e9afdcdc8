"""Worker processes that prefetch windows.

PyTorch's ``DataLoader`` runs the workers. They are forked from a small server process instead of
the trainer, whose threads, CUDA context and collectives do not survive a fork.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from open_mythos.data.stream_lanes import Position, StreamPlan, Windows, read_lanes
from open_mythos.errors import EnvironmentError_, InternalError, MythosError

TIMEOUT_S = 600.0
"""Longest wait for a worker; a file that is read again after errors takes half a minute."""
logger = logging.getLogger(__name__)


class WorkerDiedError(EnvironmentError_):
    """A worker process died."""


class WorkerLanes(IterableDataset):
    """The windows of a worker's lanes: worker i of W reads every W-th lane from i on.

    An error is the last item.
    """

    def __init__(self, plan: StreamPlan, lanes: list[int], positions: list[Position]) -> None:
        self._plan, self._lanes, self._positions = plan, lanes, positions

    def __iter__(self) -> Iterator[Windows | MythosError]:
        worker = get_worker_info()
        assert worker is not None
        mine = slice(worker.id, None, worker.num_workers)
        try:
            yield from read_lanes(self._plan, self._lanes[mine], self._positions[mine])
        except MythosError as error:
            yield error
        except Exception as error:  # a bug in the library has to reach the caller too
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}"
            yield InternalError(
                f"a data worker failed: {error!r}", where=where, value=repr(error),
                allowed="no error",
            )  # fmt: skip


def prefetched(
    plan: StreamPlan, lanes: list[int], positions: list[Position], *, workers: int, prefetch: int
) -> Iterator[Windows]:
    """Read the windows of ``lanes``, as :func:`read_lanes`, in at most one process per lane.

    The result depends neither on the number of ``workers`` nor on their timing. Each prefetches
    ``prefetch`` steps.

    Raises:
        DataError, EnvironmentError_: Raised in a worker.
        WorkerDiedError: A worker was killed, ran out of memory, or gave nothing for ``TIMEOUT_S``.
    """
    with warnings.catch_warnings():  # they are asked for, however few cores there are
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader: DataLoader[Any] = DataLoader(
            WorkerLanes(plan, lanes, positions), batch_size=None, collate_fn=_unchanged,
            num_workers=workers, prefetch_factor=prefetch, multiprocessing_context=_context(),
            worker_init_fn=_end_with_trainer,
            generator=torch.Generator(),  # or it would draw from the global one
        )  # fmt: skip
        others = set(multiprocessing.active_children())
        items = iter(loader)
        processes = set(multiprocessing.active_children()) - others
    while True:
        with _ended_after(TIMEOUT_S, processes):
            parts = [_received(items) for _ in range(workers)]
        ids = np.empty((len(lanes), plan.seq_len + 1), np.int64)
        after = [Position()] * len(lanes)
        for worker, part in enumerate(parts):
            mine = slice(worker, None, workers)
            ids[mine], after[mine] = part.ids, part.after
        yield Windows(ids, after)


def _received(items: Iterator[Windows | MythosError]) -> Windows:
    try:
        item = next(items)
    except RuntimeError as error:  # DataLoader's error for a dead worker
        raise WorkerDiedError(
            "a data worker ended unexpectedly", where="num_workers", value=str(error),
            fix="resume; if it ran out of memory, use fewer workers; a script that starts some "
            'keeps its own code under if __name__ == "__main__"',
        ) from error  # fmt: skip
    if isinstance(item, MythosError):
        try:
            raise item
        finally:  # no cycle of error and frame: the workers end with the last reference to them
            del item, items
    return item


@contextmanager
def _ended_after(seconds: float, workers: Iterable[BaseProcess]) -> Iterator[None]:
    """End the workers if the block takes longer.

    DataLoader's own timeout would keep it from noticing at once that a worker has died.
    """

    def end() -> None:
        logger.warning("the data workers gave nothing for %g seconds and are ended", seconds)
        for worker in workers:
            worker.kill()

    alarm = threading.Timer(seconds, end)
    alarm.daemon = True
    alarm.start()
    try:
        yield
    finally:
        alarm.cancel()


def _unchanged(item: Any) -> Any:
    return item


def _context() -> Any:
    """Return the start method: fork from a server that has imported this module, or spawn."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _end_with_trainer(worker: int) -> None:
    """Make a worker end when the trainer ends, however it ends, and not before.

    DataLoader's own watchdog watches the process that forked a worker. Here that is the server,
    which outlives the trainer for as long as it has a worker.
    """
    # Ctrl-C reaches every process of a terminal, but the trainer still finishes its step
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()
    assert trainer is not None

    def watch() -> None:
        trainer.join()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
