"""The one writer of files; block hashes; readers of text, JSON and safetensors.

This module loads no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from open_mythos.errors import ConfigError, DataError, EnvironmentError_

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

HASH_BLOCK_BYTES = 1 << 24
_READ_BYTES = 1 << 20
MAX_TEXT_BYTES = 1 << 26
"""Longest file that :func:`read_text` reads by default."""
WRITE_ELSEWHERE = "free space, fix the permissions, or choose another folder"
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_DEVICES = (Path("/dev"), Path("/dev/fd"))


def sync_to_disk(path: Path) -> None:
    """Fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(
    path: Path, what: str = "the file cannot be written", fix: str = WRITE_ELSEWHERE
) -> Iterator[Path]:
    """Yield the path of a new file that takes the place of ``path`` at the end, or never does.

    It lies beside ``path`` under a random name and is fsynced before it is renamed. Missing folders
    are created. A link is refused: in a folder that came from elsewhere it may point anywhere.

    Args:
        path: The file to write.
        what: What is wrong if it cannot be written, for the message.
        fix: What to do then.

    Raises:
        EnvironmentError_: The file cannot be written.
    """
    try:
        refuse_link(path, what)
        if "\0" in str(path):
            raise OSError("a NUL character in the name")
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")
        os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _NO_FOLLOW, 0o666))
        try:
            yield new
            sync_to_disk(new)
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise EnvironmentError_(
            what, where=str(path), value=str(error), allowed="a file in a writable folder", fix=fix
        ) from error  # fmt: skip


def write_text(
    path: Path, text: str, what: str = "the file cannot be written", fix: str = WRITE_ELSEWHERE
) -> None:
    """Write ``text`` in UTF-8 as :func:`replacing` does; devices such as /dev/stdout as they are.

    Raises:
        EnvironmentError_: The file cannot be written.
    """
    if path.parent in _DEVICES:
        path.write_text(text, encoding="utf-8")
        return
    with replacing(path, what, fix) as new:
        new.write_text(text, encoding="utf-8")


def check_writable(path: Path, what: str, fix: str = WRITE_ELSEWHERE, begins: str = "") -> None:
    """Find out before a long computation whether :func:`write_text` can write ``path``.

    Args:
        path: The file to write.
        what: What is wrong if it cannot be written, for the message.
        fix: What to do then.
        begins: How a file begins that may be replaced, as an empty one may: others are not ours.

    Raises:
        EnvironmentError_: It cannot.
    """
    if path.parent in _DEVICES:
        return
    refuse_link(path, what)
    try:
        if path.is_dir():
            raise OSError("it is a folder")
        if path.is_file() and not _begins(path, begins):
            raise OSError("a file of another kind is there")
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")
        probe.touch(exist_ok=False)
        probe.unlink()
    except (OSError, ValueError) as error:
        raise EnvironmentError_(
            what, where=str(path), value=str(error), allowed="a file in a writable folder", fix=fix
        ) from error  # fmt: skip


def _begins(path: Path, text: str) -> bool:
    with path.open("rb") as file:
        found = file.read(len(text.encode()))
    return found in (b"", text.encode())


@contextmanager
def locked(path: Path, *, active: bool = True) -> Iterator[None]:
    """Hold the lock file ``path``, which the system frees when the process ends, however it ends.

    Args:
        path: The file; created if missing, with its folder.
        active: False does nothing: another process of the group holds it.

    Raises:
        EnvironmentError_: Another process holds it, or it cannot be created.
    """
    if not active or fcntl is None:
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | _NO_FOLLOW, 0o666)
    except OSError as error:
        raise EnvironmentError_(
            "the folder cannot be locked", where=str(path), value=str(error),
            allowed="a writable folder", fix=WRITE_ELSEWHERE,
        ) from error  # fmt: skip
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            raise EnvironmentError_(
                "another process works in the folder", where=str(path.parent), value=holder,
                allowed="one process group at a time",
                fix="wait for it or stop it, or choose another folder",
            ) from error  # fmt: skip
        except OSError:
            pass  # a file system without locks
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def remove_abandoned(parent: Path, begin: str, end: str, lock: str) -> None:
    """Remove the folders that killed processes left: nobody holds their lock any more.

    Args:
        parent: Where they lie.
        begin: How their names begin; eight hexadecimal digits follow.
        end: How they end.
        lock: Name of the lock file that a process holds while it works in one.
    """
    name = re.compile(re.escape(begin) + "[0-9a-f]{8}" + re.escape(end))
    if fcntl is None or not parent.is_dir():
        return
    for folder in parent.iterdir():
        if name.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
            try:
                with locked(folder / lock):
                    shutil.rmtree(folder, ignore_errors=True)
            except EnvironmentError_:  # somebody works there, or it is somebody else's
                continue


def refuse_link(path: Path, what: str = "the file cannot be written") -> None:
    """Refuse to write to ``path`` if it is a link.

    Raises:
        EnvironmentError_: It is one.
    """
    if path.is_symlink():
        raise EnvironmentError_(
            what, where=str(path), value=f"a link to {os.readlink(path)}",
            allowed="a file or folder of its own",
            fix="remove the link, or write to what it points to by name",
        )  # fmt: skip


def check_new_folder(out: str | Path, where: str = "out") -> Path:
    """Return a folder to write, which is new or empty; ``where`` names it in the error.

    Raises:
        ConfigError: It holds something, or is a file.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            "the folder is not empty", where=where, value=str(out),
            allowed="a folder that is new or empty", fix="name another one",
        )  # fmt: skip
    return folder


def hash_blocks(path: Path) -> list[str]:
    """Return the SHA-256 of each 16 MiB of a file, so that damage can be located."""
    with ThreadPoolExecutor() as pool:
        starts = range(0, path.stat().st_size, HASH_BLOCK_BYTES)
        return list(pool.map(_hash_block, repeat(path), starts))


def _hash_block(path: Path, start: int) -> str:
    digest, left = hashlib.sha256(), HASH_BLOCK_BYTES
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (piece := file.read(min(left, _READ_BYTES))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def read_text(path: Path, limit: int = MAX_TEXT_BYTES, errors: str = "strict") -> str:
    """Read a regular file of at most ``limit`` bytes as UTF-8, without a byte order mark.

    A pipe or a device, which may never end, is refused before it is opened. ``errors`` is that of
    ``bytes.decode``.

    Raises:
        OSError: It cannot be read, or is no regular file.
        ValueError: It is longer, or no UTF-8.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a regular file")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"longer than {limit:,} bytes")
    return content.decode("utf-8-sig", errors)


def read_object(
    path: Path, what: str, fix: str = "", limit: int = MAX_TEXT_BYTES
) -> dict[str, Any]:
    """Read the object in a JSON file.

    Args:
        path: The file.
        what: What is wrong if it cannot be read, for the message.
        fix: What to do then.
        limit: Most bytes of the file.

    Raises:
        DataError: The file cannot be read or holds no JSON object.
    """
    try:
        values = json.loads(read_text(path, limit))
        found = type(values).__name__
    except (OSError, ValueError, RecursionError) as error:
        values, found = None, str(error)
    if not isinstance(values, dict):
        raise DataError(what, where=str(path), value=found, allowed="a JSON object", fix=fix)
    return values


@contextmanager
def open_safetensors(path: Path, framework: str = "pt") -> Iterator[Any]:
    """Open a safetensors file, as ``safetensors.safe_open``.

    Raises:
        DataError: It is no regular file or damaged; inside of the block, too.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError("not a regular file")
        with safe_open(path, framework) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise DataError(
            "not a complete safetensors file", where=str(path), value=str(error),
            allowed="a whole file", fix="copy the file again",
        ) from error  # fmt: skip
