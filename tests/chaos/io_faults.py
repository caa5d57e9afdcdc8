"""Every single input and output operation of a save, seen, and made to fail one at a time.

What Python code does is caught at ``os`` and ``open``. safetensors writes and reads natively: there
the call as a whole is the operation.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from open_mythos.train.checkpoint import manifest, write


class Operation(NamedTuple):
    """The ``number``-th ``call`` of this path, which is relative to the folder."""

    call: str
    path: str
    number: int


Whole = Callable[[], Any]
"""Does the operation; the other of its kind does half of it."""
Fault = Callable[[Whole, Whole], Any]
"""What happens in place of an operation."""


def input_output_error(whole: Whole, half: Whole) -> Any:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def disk_full(whole: Whole, half: Whole) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def done_but_reported_failed(whole: Whole, half: Whole) -> Any:
    whole()
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def torn(whole: Whole, half: Whole) -> Any:
    half()
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def silently_torn(whole: Whole, half: Whole) -> Any:
    return half()


def killed_before(whole: Whole, half: Whole) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_within(whole: Whole, half: Whole) -> Any:
    half()
    os.kill(os.getpid(), signal.SIGKILL)


def killed_after(whole: Whole, half: Whole) -> Any:
    whole()
    os.kill(os.getpid(), signal.SIGKILL)


FAULTS: dict[str, Fault] = {
    "EIO": input_output_error,
    "ENOSPC": disk_full,
    "done, but EIO": done_but_reported_failed,
    "torn, ENOSPC": torn,
    "silently torn": silently_torn,
    "kill before": killed_before,
    "torn, kill": killed_within,
    "kill after": killed_after,
}
TEARABLE = ("write", "read", "save_file")
"""Calls that can be half done."""
DEADLY = ("kill before", "torn, kill", "kill after")


def possible(fault: str, call: str) -> bool:
    return call in TEARABLE or "torn" not in fault


class Interposed:
    """Within ``with``, ``decide`` is asked at every operation on what lies in ``folder``.

    Args:
        folder: The checkpoints.
        decide: Gives a fault, or None to let the operation happen.
    """

    def __init__(self, folder: Path, decide: Callable[[Operation], Fault | None]) -> None:
        self.folder, self._decide = os.path.abspath(folder), decide
        self._counts: Counter[tuple[str, str]] = Counter()
        self._paths: dict[int, str] = {}
        self._lock = threading.RLock()
        self._inside = threading.local()
        self._originals: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Interposed:
        for name in ("mkdir", "unlink", "remove", "rmdir", "chmod", "stat", "lstat", "listdir"):
            self._patch(os, name, self._by_path(getattr(os, name), name))
        for name in ("rename", "replace"):
            self._patch(os, name, self._by_path(getattr(os, name), name))
        self._patch(os, "scandir", self._by_path(os.scandir, "scandir"))
        self._patch(os, "open", self._open_descriptor(os.open))
        self._patch(os, "close", self._close(os.close))
        self._patch(os, "fsync", self._by_path(os.fsync, "fsync"))
        opening = self._open(io.open)
        self._patch(io, "open", opening)
        self._patch(builtins, "open", opening)
        self._patch(write, "save_file", self._save_file(write.save_file))
        self._patch(manifest, "safe_open", self._by_path(manifest.safe_open, "safe_open"))
        return self

    def __exit__(self, *_: object) -> None:
        for module, name, original in reversed(self._originals):
            setattr(module, name, original)
        self._originals.clear()

    def _patch(self, module: Any, name: str, replacement: Any) -> None:
        self._originals.append((module, name, getattr(module, name)))
        setattr(module, name, replacement)

    def _where(self, path: Any, dir_fd: int | None = None) -> str | None:
        """``path`` relative to the folder; None if it lies elsewhere."""
        if isinstance(path, int):
            full = self._paths.get(path)
        elif isinstance(path, str | os.PathLike):
            base = self._paths.get(dir_fd, "") if dir_fd is not None else ""
            full = os.path.abspath(os.path.join(base, os.fspath(path)))
        else:
            full = None
        if full is None or not (full + os.sep).startswith(self.folder + os.sep):
            return None
        return os.path.relpath(full, self.folder)

    def perform(self, call: str, path: str | None, whole: Whole, half: Whole | None = None) -> Any:
        """Do an operation, or what ``decide`` wants instead."""
        if path is None or getattr(self._inside, "operation", False):
            return whole()
        with self._lock:
            number = self._counts[call, path]
            self._counts[call, path] += 1
        self._inside.operation = True  # what an operation is made of is not counted again
        try:
            fault = self._decide(Operation(call, path, number))
            return whole() if fault is None else fault(whole, half or (lambda: None))
        finally:
            self._inside.operation = False

    def _by_path(self, plain: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(path: Any = ".", *args: Any, **options: Any) -> Any:
            where = self._where(path, options.get("dir_fd"))
            return self.perform(name, where, lambda: plain(path, *args, **options))

        return call

    def _open_descriptor(self, plain: Callable[..., int]) -> Callable[..., int]:
        def call(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            where = self._where(path, dir_fd)
            whole = lambda: plain(path, flags, mode, dir_fd=dir_fd)  # noqa: E731
            descriptor = self.perform("os.open", where, whole)
            if where is not None:
                self._paths[descriptor] = os.path.join(self.folder, where)
            return descriptor

        return call

    def _close(self, plain: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            self._paths.pop(descriptor, None)
            plain(descriptor)

        return call

    def _open(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **options: Any) -> Any:
            where = None if isinstance(path, int) else self._where(path)
            file = self.perform("open", where, lambda: plain(path, *args, **options))
            return file if where is None else _File(file, where, self)

        return call

    def _save_file(self, plain: Callable[..., None]) -> Callable[..., None]:
        def call(tensors: Any, path: Path, metadata: Any = None) -> None:
            def half() -> None:
                plain(tensors, path, metadata=metadata)
                os.truncate(path, path.stat().st_size // 2)

            def whole() -> None:
                plain(tensors, path, metadata=metadata)

            try:
                self.perform("save_file", self._where(path), whole, half)
            except OSError as error:  # as safetensors says it
                raise SafetensorError(
                    f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
                ) from error

        return call


class _File:
    """An open file whose reads and writes are operations."""

    def __init__(self, file: Any, where: str, disk: Interposed) -> None:
        self._file, self._where, self._disk = file, where, disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, content: Any) -> int:
        def whole() -> int:
            return self._file.write(content)

        def half() -> int:
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            return len(content)

        return self._disk.perform("write", self._where, whole, half)

    def read(self, *args: Any) -> Any:
        def half() -> Any:
            content = self._file.read(*args)
            return content[: len(content) // 2]

        return self._disk.perform("read", self._where, lambda: self._file.read(*args), half)
