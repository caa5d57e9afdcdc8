"""Windows that worker processes read ahead.

PyTorch's ``DataLoader`` runs the workers. They are forked from a small server process instead of
the trainer, whose threads, CUDA context and collectives do not survive a fork. Workers send arrays
and numbers; an error is sent as its five parts.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from open_mythos.data.permutation import Int64Array
from open_mythos.data.stream_lanes import Lane, Position, StreamPlan
from open_mythos.errors import DataError, EnvironmentError_, InternalError, MythosError
from open_mythos.tokenizer import Tokenizer, load_tokenizer

_ERRORS = {kind.__name__: kind for kind in (DataError, EnvironmentError_, InternalError)}


class WorkerGoneError(EnvironmentError_):
    """A worker process died."""


class Windows(NamedTuple):
    """The windows of one step."""

    ids: Int64Array
    """(lanes, T + 1)."""
    after: list[Position]
    """Of each lane: where its next window begins."""


class _Failure(NamedTuple):
    """An error sent by a worker."""

    kind: str
    parts: dict[str, Any]


class LaneWindows(IterableDataset):
    """Reads the windows of some lanes step by step; worker i of W reads every W-th lane from i.

    Args:
        plan: What to read.
        tokenizer: Of the documents.
        lanes: Which lanes.
        positions: Where each of them begins.
    """

    def __init__(
        self, plan: StreamPlan, tokenizer: Tokenizer, lanes: range, positions: list[Position]
    ) -> None:
        self._plan, self._tokenizer = plan, tokenizer
        self._lanes, self._positions = lanes, positions

    def __iter__(self) -> Iterator[Windows]:
        worker = get_worker_info()
        mine = slice(worker.id, None, worker.num_workers) if worker else slice(None)
        lanes = [
            Lane(self._plan, self._tokenizer, lane, position)
            for lane, position in zip(self._lanes[mine], self._positions[mine], strict=True)
        ]
        while True:
            made = [lane.window() for lane in lanes]
            yield Windows(np.stack([ids for ids, _ in made]), [after for _, after in made])


class _InWorker(IterableDataset):
    """:class:`LaneWindows` that can be pickled for a worker, and whose errors are sent back."""

    def __init__(
        self, plan: StreamPlan, tokenizer: Tokenizer, lanes: range, positions: list[Position]
    ) -> None:
        self._arguments = (plan, lanes, positions)
        # as files: a pickled `tokenizers` object forgets that text is only text
        self._fingerprint, self._files = tokenizer.fingerprint, _saved(tokenizer)

    def __iter__(self) -> Iterator[Windows | _Failure]:
        try:
            plan, lanes, positions = self._arguments
            tokenizer = _loaded(self._files, self._fingerprint)
            yield from LaneWindows(plan, tokenizer, lanes, positions)
        except MythosError as error:
            yield _Failure(type(error).__name__, _parts(error))
        except Exception as error:  # a bug in the library still has to reach the caller
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}"
            parts = {"what": f"a data worker failed: {error!r}", "where": where}
            yield _Failure(InternalError.__name__, parts)


class WorkerPool:
    """Worker processes that read a range of lanes, each ``prefetch`` steps ahead.

    The windows do not depend on the number of workers or their timing.

    Args:
        plan: What to read.
        tokenizer: Saved, and loaded in each worker.
        lanes: Which lanes.
        positions: Where each of them begins.
        workers: Number of processes, at most that of the lanes.
        prefetch: Steps that each worker prefetches.
    """

    def __init__(
        self,
        plan: StreamPlan,
        tokenizer: Tokenizer,
        lanes: range,
        positions: list[Position],
        *,
        workers: int,
        prefetch: int,
    ) -> None:
        self._lanes, self._workers = lanes, workers
        loader: DataLoader[Any] = DataLoader(
            _InWorker(plan, tokenizer, lanes, positions), batch_size=None, collate_fn=_as_it_is,
            num_workers=workers, prefetch_factor=prefetch, multiprocessing_context=_context(),
            worker_init_fn=_live_with_the_trainer,
            generator=torch.Generator(),  # or it would draw from the global one
        )  # fmt: skip
        self._items = iter(loader)

    def __iter__(self) -> Iterator[Windows]:
        return self

    def __next__(self) -> Windows:
        """Return the windows of the next step.

        Raises:
            DataError, EnvironmentError_: What a worker raised.
            WorkerGoneError: A worker was killed, or ran out of memory.
        """
        parts = [self._next_item() for _ in range(self._workers)]
        ids = np.empty((len(self._lanes), parts[0].ids.shape[1]), np.int64)
        after = [Position()] * len(self._lanes)
        for worker, part in enumerate(parts):
            mine = slice(worker, None, self._workers)
            ids[mine], after[mine] = part.ids, part.after
        return Windows(ids, after)

    def _next_item(self) -> Windows:
        try:
            item = next(self._items)
        except RuntimeError as error:  # what DataLoader says of a worker that is gone
            raise WorkerGoneError(
                "a data worker ended unexpectedly", where="num_workers", value=str(error),
                fix="resume; if it ran out of memory, use fewer workers",
            ) from error  # fmt: skip
        if isinstance(item, _Failure):
            raise _ERRORS.get(item.kind, InternalError)(item.parts.pop("what"), **item.parts)
        return item


def _context() -> Any:
    """Return the start method: forking a server that has imported what workers need, or
    spawning."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _live_with_the_trainer(worker: int) -> None:
    """Make a worker end when the trainer ends, however it ends, and not before.

    DataLoader's own watch looks at the process that forked a worker. Here that is the server,
    which outlives the trainer for as long as it has a worker.
    """
    # Ctrl-C reaches every process of a terminal, but the trainer still ends its step
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_trainer, daemon=True).start()


def _end_with_the_trainer() -> None:
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(0)


def _as_it_is(item: Any) -> Any:
    return item


def _parts(error: MythosError) -> dict[str, Any]:
    plain = error.value if isinstance(error.value, str | int | float) else str(error.value)
    value = {} if error.value is None else {"value": plain}
    names = ("what", "where", "allowed", "fix")
    return {name: getattr(error, name) for name in names} | value


def _saved(tokenizer: Tokenizer) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _loaded(files: dict[str, bytes], fingerprint: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != fingerprint:
        raise DataError(
            "the tokenizer is another one after it was saved and loaded", where="tokenizer",
            value=tokenizer.fingerprint, allowed=fingerprint,
            fix="use num_workers=0, or a tokenizer that load_tokenizer reads back",
        )  # fmt: skip
    return tokenizer
