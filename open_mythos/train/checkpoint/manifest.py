"""The manifest of a checkpoint: size and hashes of every file in it.

Files are hashed in blocks of 16 MiB by a thread pool, so that damage is located by block.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from open_mythos.checks import checked
from open_mythos.errors import DataError, EnvironmentError_
from open_mythos.files import HASH_BLOCK_BYTES, hash_blocks, read_object

_FIX = "resume from an older checkpoint, or copy this one again"
MANIFEST_FILE = "manifest.json"
FORMAT = 2

Entry = dict[str, Any]
"""``{"bytes": size of the file, "sha256": [hash of each block]}``"""


def entry_of_tensors(path: Path, tensors: Mapping[str, Tensor], pool: ThreadPoolExecutor) -> Entry:
    """Compare a safetensors file with contiguous CPU ``tensors``; return its manifest entry.

    The entry hashes the tensors in memory, not the file, so that a disk that drops or corrupts
    bytes cannot confirm its own content.

    Raises:
        EnvironmentError_: The file holds something else.
    """
    with path.open("rb") as file:
        head = file.read(8)
        head += file.read(int.from_bytes(head, "little"))
    with safe_open(path, "pt") as file:
        for name in sorted(set(file.keys()) ^ tensors.keys()):
            raise _differs(path, name, "the tensors that were written")
        for name, expected in tensors.items():
            found = file.get_tensor(name)
            same = (found.dtype, found.shape) == (expected.dtype, expected.shape)
            if not same or not np.array_equal(_bytes(found), _bytes(expected)):
                raise _differs(path, name, "the bytes that were written")
    try:
        layout = json.loads(head[8:])
        order = sorted(tensors, key=lambda name: layout[name]["data_offsets"])
    except (ValueError, KeyError) as error:
        raise _differs(path, str(error), "the header that was written") from error
    return _entry([memoryview(head), *(_bytes(tensors[name]).data for name in order)], pool)


def entry_of_text(path: Path, text: str, pool: ThreadPoolExecutor) -> Entry:
    """Compare a file with ``text``; return its manifest entry.

    Raises:
        EnvironmentError_: The file holds something else.
    """
    found, expected = path.read_bytes(), text.encode()
    if found != expected:
        raise _differs(path, f"{len(found)} bytes", "the text that was written")
    return _entry([memoryview(expected)], pool)


def entry_of_file(path: Path) -> Entry:
    """Return the manifest entry of a file on the disk.

    Raises:
        DataError: The file cannot be read.
    """
    size = _size(path)
    try:
        return {"bytes": size, "sha256": hash_blocks(path)}
    except OSError as error:
        raise _damaged(path, str(error), "a readable file") from error


def manifest_text(files: Mapping[str, Entry]) -> str:
    """Return the content of ``manifest.json``."""
    return as_json({"format": FORMAT, "files": {name: files[name] for name in sorted(files)}})


@checked
def verify_checkpoint(path: str | Path) -> None:
    """Compare every file of a checkpoint with its manifest; its tensors must be finite.

    Raises:
        DataError: A file is missing, changed or not in the manifest; names it and the first
            damaged block, or the tensor that is not finite.
    """
    folder = Path(path)
    manifest_path = folder / MANIFEST_FILE
    manifest = read_json(manifest_path)
    files, version = manifest.get("files"), manifest.get("format")
    if version != FORMAT or not isinstance(files, dict):
        raise _damaged(manifest_path, version, f"format {FORMAT}")
    # no hash covers the manifest itself: without its last byte it is still valid JSON
    if manifest_path.read_text(encoding="utf-8") != as_json(manifest):
        raise _damaged(manifest_path, "another form", "as it was written")
    try:
        names = {each.name for each in folder.iterdir()} - {MANIFEST_FILE}
    except OSError as error:
        raise _damaged(folder, str(error), "a readable folder") from error
    for name in sorted(names ^ files.keys()):
        expected = "as listed in the manifest" if name in files else "no file of this name"
        raise _damaged(folder / name, "present" if name in names else "missing", expected)
    for name, expected in files.items():
        file = folder / name
        size = expected.get("bytes") if isinstance(expected, dict) else None
        if (found := _size(file)) != size:  # before reading what a hole may make endless
            raise _damaged(file, f"{found} bytes", f"{size} bytes")
        entry = entry_of_file(file)
        if entry != expected:
            raise _damaged(file, *_difference(entry, expected))
    _check_finite(folder)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise _damaged(path, str(error), "a readable file") from error


def _check_finite(folder: Path) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if not torch.isfinite(file.get_tensor(name)).all():
                        raise _damaged(path, f"{name} is not finite", "finite tensors")
        except SafetensorError as error:
            raise _damaged(path, str(error), "a safetensors file") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file of a checkpoint.

    Raises:
        DataError: The file cannot be read or holds no JSON object.
    """
    return read_object(path, "the checkpoint is damaged", _FIX)


def as_json(values: Mapping[str, Any]) -> str:
    """Serialize to JSON in the one form that checkpoints use."""
    return json.dumps(values, indent=2) + "\n"


def _damaged(path: Path, value: Any, allowed: str) -> DataError:
    return DataError(
        "the checkpoint is damaged", where=str(path), value=value, allowed=allowed,
        fix=_FIX,
    )  # fmt: skip


def _differs(path: Path, value: Any, allowed: str) -> EnvironmentError_:
    return EnvironmentError_(
        "the file does not read back as it was written", where=str(path), value=value,
        allowed=allowed, fix="check the disk, then resume; older checkpoints are untouched",
    )  # fmt: skip


def _entry(pieces: list[memoryview], pool: ThreadPoolExecutor) -> Entry:
    """Return the entry of a file that holds the concatenation of ``pieces``."""
    size = sum(len(piece) for piece in pieces)
    return {"bytes": size, "sha256": list(pool.map(_hash_pieces, _blocks(pieces)))}


def _blocks(pieces: list[memoryview]) -> Iterator[list[memoryview]]:
    """Cut the concatenation of ``pieces`` into blocks without copying."""
    block: list[memoryview] = []
    free = HASH_BLOCK_BYTES
    for piece in pieces:
        while len(piece) >= free:
            yield [*block, piece[:free]]
            block, piece, free = [], piece[free:], HASH_BLOCK_BYTES
        block.append(piece)
        free -= len(piece)
    if free < HASH_BLOCK_BYTES:
        yield block


def _hash_pieces(pieces: list[memoryview]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _difference(found: Entry, expected: Any) -> tuple[str, str]:
    """Describe the found and the expected value of the first difference."""
    try:
        pairs = zip(found["sha256"], expected["sha256"], strict=True)
        start = HASH_BLOCK_BYTES * next(i for i, (a, b) in enumerate(pairs) if a != b)
    except (KeyError, TypeError, ValueError, StopIteration):  # the manifest itself is damaged
        return str(found), str(expected)
    return f"other content within 16 MiB of byte {start}", "content of the hash in the manifest"


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()
