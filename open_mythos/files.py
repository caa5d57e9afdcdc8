"""Durable writes, block hashes and JSON files (this module loads no torch)."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

from open_mythos.errors import DataError

HASH_BLOCK_BYTES = 1 << 24
_READ_BYTES = 1 << 20


def sync_to_disk(path: Path) -> None:
    """Fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def read_object(path: Path, what: str, fix: str = "", limit: int = -1) -> dict[str, Any]:
    """Read the object in a JSON file.

    Args:
        path: The file.
        what: What is wrong if it cannot be read, for the message.
        fix: What to do then.
        limit: Longest text accepted; any by default.

    Raises:
        DataError: The file cannot be read or holds no JSON object.
    """
    try:
        with path.open(encoding="utf-8") as file:
            values = json.loads(file.read(limit))
        found = type(values).__name__
    except (OSError, ValueError, RecursionError) as error:
        values, found = None, str(error)
    if not isinstance(values, dict):
        raise DataError(what, where=str(path), value=found, allowed="a JSON object", fix=fix)
    return values
