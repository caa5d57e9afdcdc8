"""The manifest of a checkpoint: what every file in it must contain, to the last bit.

Files are hashed in blocks of 16 MiB, by all cores at once, and damage is located by block.
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
from safetensors import safe_open
from torch import Tensor

from open_mythos.errors import DataError, EnvironmentError_

MANIFEST_FILE = "manifest.json"
FORMAT = 2
BLOCK_BYTES = 1 << 24
_READ_BYTES = 1 << 20

Entry = dict[str, Any]
"""``{"bytes": size of the file, "sha256": [hash of each block]}``"""


def entry_of_tensors(path: Path, tensors: Mapping[str, Tensor], pool: ThreadPoolExecutor) -> Entry:
    """What the manifest says of a safetensors file that must hold ``tensors``.

    What is hashed is what was meant: a disk that silently loses bytes, or reads them wrongly once,
    cannot vouch for itself. Then the file is compared with it.

    Args:
        path: The file; its header says in which order the tensors are.
        tensors: On the CPU, contiguous.
        pool: Its threads share the hashing.

    Raises:
        EnvironmentError_: The file holds something else; names it.
    """
    with path.open("rb") as file:
        head = file.read(8)
        head += file.read(int.from_bytes(head, "little"))
    with safe_open(path, "pt") as file:
        for name in sorted(set(file.keys()) ^ tensors.keys()):
            raise _lost(path, name, "the tensors that were written")
        for name, meant in tensors.items():
            found = file.get_tensor(name)
            same = (found.dtype, found.shape) == (meant.dtype, meant.shape)
            if not same or not np.array_equal(_bytes(found), _bytes(meant)):
                raise _lost(path, name, "the bytes that were written")
    try:
        layout = json.loads(head[8:])
        order = sorted(tensors, key=lambda name: layout[name]["data_offsets"])
    except (ValueError, KeyError) as error:
        raise _lost(path, str(error), "the header that was written") from error
    return _entry([memoryview(head), *(_bytes(tensors[name]).data for name in order)], pool)


def entry_of_text(path: Path, text: str, pool: ThreadPoolExecutor) -> Entry:
    """What the manifest says of a file that must hold ``text``.

    Raises:
        EnvironmentError_: It holds something else.
    """
    found, meant = path.read_bytes(), text.encode()
    if found != meant:
        raise _lost(path, f"{len(found)} bytes", "the text that was written")
    return _entry([memoryview(meant)], pool)


def manifest_text(files: Mapping[str, Entry]) -> str:
    """The content of ``manifest.json``."""
    return as_json({"format": FORMAT, "files": {name: files[name] for name in sorted(files)}})


def verify_files(folder: Path) -> None:
    """Compare every file in ``folder`` with the manifest there.

    Raises:
        DataError: A file is missing, superfluous or changed; names it, and where it differs.
    """
    path = folder / MANIFEST_FILE
    text = _read_text(path)
    manifest = _object(path, text)
    files, version = manifest.get("files"), manifest.get("format")
    if version != FORMAT or not isinstance(files, dict):
        raise damaged(path, version, f"format {FORMAT}")
    # the manifest vouches for itself by its form: a lost last byte would still be JSON
    if text != as_json(manifest):
        raise damaged(path, "another form", "as it was written")
    try:
        names = {each.name for each in folder.iterdir()} - {MANIFEST_FILE}
    except OSError as error:
        raise damaged(folder, str(error), "a readable folder") from error
    for name in sorted(names ^ files.keys()):
        expected = "as listed in the manifest" if name in files else "no file of this name"
        raise damaged(folder / name, "present" if name in names else "missing", expected)
    with ThreadPoolExecutor() as pool:
        for name, expected in files.items():
            found = entry_of_file(folder / name, pool)
            if found != expected:
                raise damaged(folder / name, *_difference(found, expected))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
        DataError: It cannot be read, or is none.
    """
    return _object(path, _read_text(path))


def as_json(values: Mapping[str, Any]) -> str:
    """The one form in which checkpoints hold JSON."""
    return json.dumps(values, indent=2) + "\n"


def damaged(path: Path, value: Any, allowed: str) -> DataError:
    """The error of a file that is not as it was written."""
    return DataError(
        "the checkpoint is damaged", where=str(path), value=value, allowed=allowed,
        fix="resume from an older checkpoint, or copy this one again",
    )  # fmt: skip


def _lost(path: Path, value: Any, allowed: str) -> EnvironmentError_:
    return EnvironmentError_(
        "the disk does not give back what was written", where=str(path), value=value,
        allowed=allowed,
        fix="have the disk looked at, then resume; older checkpoints are untouched",
    )  # fmt: skip


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise damaged(path, str(error), "a JSON object") from error


def _object(path: Path, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, str(error), "a JSON object") from error
    if not isinstance(values, dict):
        raise damaged(path, values, "a JSON object")
    return values


def _entry(pieces: list[memoryview], pool: ThreadPoolExecutor) -> Entry:
    """Of the concatenation of ``pieces``, which are bytes."""
    size = sum(len(piece) for piece in pieces)
    return {"bytes": size, "sha256": list(pool.map(_digest, _blocks(pieces)))}


def _blocks(pieces: list[memoryview]) -> Iterator[list[memoryview]]:
    """Cut the concatenation of ``pieces`` into blocks, without copying."""
    block: list[memoryview] = []
    room = BLOCK_BYTES
    for piece in pieces:
        while len(piece) >= room:
            yield [*block, piece[:room]]
            block, piece, room = [], piece[room:], BLOCK_BYTES
        block.append(piece)
        room -= len(piece)
    if room < BLOCK_BYTES:
        yield block


def _digest(pieces: list[memoryview]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def entry_of_file(path: Path, pool: ThreadPoolExecutor) -> Entry:
    """What the manifest says of a file as it is found.

    Raises:
        DataError: It cannot be read.
    """
    try:
        size = path.stat().st_size
        starts = range(0, size, BLOCK_BYTES)
        return {
            "bytes": size,
            "sha256": list(pool.map(_block_of_file, [path] * len(starts), starts)),
        }
    except OSError as error:
        raise damaged(path, str(error), "a readable file") from error


def _block_of_file(path: Path, start: int) -> str:
    digest, left = hashlib.sha256(), BLOCK_BYTES
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (piece := file.read(min(left, _READ_BYTES))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def _difference(found: Entry, expected: Any) -> tuple[str, str]:
    """What differs, and what it should be, in few words."""
    if not isinstance(expected, dict) or expected.keys() != found.keys():
        return str(found), str(expected)
    if found["bytes"] != expected["bytes"]:
        return f"{found['bytes']} bytes", f"{expected['bytes']} bytes"
    blocks, wanted = found["sha256"], expected["sha256"]
    if not isinstance(blocks, list) or not isinstance(wanted, list) or len(blocks) != len(wanted):
        return f"sha256 {blocks}", f"sha256 {wanted}"
    first = next(i for i, pair in enumerate(zip(blocks, wanted, strict=True)) if pair[0] != pair[1])
    return (
        f"other content within 16 MiB of byte {first * BLOCK_BYTES}",
        "what the manifest has the hash of",
    )


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()
