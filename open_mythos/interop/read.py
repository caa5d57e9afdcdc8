"""Read a folder of another project's checkpoint: its configuration and its tensors.

Tensors come from safetensors, whole or in shards with an index. Pickles are read only on request,
and then by PyTorch's loader for weights alone.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_mythos.errors import DataError
from open_mythos.files import hash_blocks, open_safetensors, read_object
from open_mythos.hub.places import CONFIG_FILE, download, is_hub_id, read_index

INDEX = "*.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth")
FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "LICENSE*", "README.md")
"""What is read of a model on the hub: weights, tokenizer, chat template, licence."""


class Tensors(Mapping[str, Tensor]):
    """Tensors by name, each read from its file when asked for.

    Args:
        files: Name -> the safetensors file that holds it.
        pickled: Tensors that were read already.
    """

    def __init__(self, files: Mapping[str, Path], pickled: Mapping[str, Tensor]) -> None:
        self._files, self._pickled = files, pickled

    def __getitem__(self, name: str) -> Tensor:
        if name in self._pickled:
            return self._pickled[name]
        path = self._files[name]
        with open_safetensors(path) as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        yield from self._files
        yield from self._pickled

    def __len__(self) -> int:
        return len(self._files) + len(self._pickled)


@dataclass(frozen=True)
class Source:
    """A checkpoint of another project.

    Attributes:
        folder: Where it lies.
        name: As the caller named it.
        config: Content of its ``config.json``.
        tensors: Its tensors by name.
        files: The files that hold them.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    files: tuple[Path, ...]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file names and of the hashes of their blocks of 16 MiB."""
        digest = hashlib.sha256()
        for path in self.files:
            digest.update("\n".join([path.name, *hash_blocks(path), ""]).encode())
        return digest.hexdigest()


def read_source(source: str | Path, allow_pickle: bool = False) -> Source:
    """Read a checkpoint's configuration and the names of its tensors.

    Args:
        source: A folder with ``config.json`` and weights, or "owner/name" on the Hugging Face hub.
        allow_pickle: Read ``.bin``, ``.pt`` and ``.pth`` files too, if there are no safetensors.

    Raises:
        DataError: There is no checkpoint, or a file cannot be read.
        EnvironmentError_: The hub cannot be reached, or has no such model.
    """
    folder = Path(source)
    if not folder.exists() and is_hub_id(source):
        patterns = FILES + (PICKLES if allow_pickle else ())
        folder = download(str(source), patterns, where="source", verb="convert")
    if not folder.is_dir():
        raise DataError(
            "no checkpoint there", where="source", value=str(source),
            allowed=f"a folder with {CONFIG_FILE} and weights, or owner/name on the hub",
            fix="check the path",
        )  # fmt: skip
    config = read_object(
        folder / CONFIG_FILE, "the configuration is not readable", "copy the folder again"
    )
    files, pickled = _weights(folder), dict[str, Tensor]()
    paths = sorted(set(files.values()))
    if not files:
        paths = sorted(path for pattern in PICKLES for path in folder.glob(pattern))
        if not paths or not allow_pickle:
            raise DataError(
                "the folder holds no safetensors", where="source", value=str(source),
                allowed="model.safetensors, or shards with an index"
                + ("; pickles are read with --allow-pickle" if paths else ""),
                fix="--allow-pickle reads weights alone, and runs no code of the file"
                if paths else "copy the folder again",
            )  # fmt: skip
        for path in paths:
            pickled |= _unpickle(path)
    return Source(folder, str(source), config, Tensors(files, pickled), tuple(paths))


def _weights(folder: Path) -> dict[str, Path]:
    """Return name -> file of all safetensors; those of the index, if there is one."""
    indices = sorted(folder.glob(INDEX))
    if not indices:
        return {name: path for path in sorted(folder.glob("*.safetensors")) for name in _keys(path)}
    where = read_index(indices[0])
    held = {file: set(_keys(folder / file)) for file in sorted(set(where.values()))}
    for name, file in where.items():
        if name not in held[file]:
            raise DataError(
                "a shard lacks a tensor of the index", where=str(folder / file), value=name,
                allowed="the shards of the index", fix="copy the folder again",
            )  # fmt: skip
    return {name: folder / file for name, file in where.items()}


def _keys(path: Path) -> list[str]:
    with open_safetensors(path) as file:
        return list(file.keys())


def _unpickle(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a pickle with the loader that runs no code of the file."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise OSError("not a regular file")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(
            "the pickle holds more than weights, or is damaged", where=str(path),
            value=str(error).splitlines()[0], allowed="a state dict of tensors",
            fix="ask for safetensors, or save the state dict alone",
        ) from error  # fmt: skip
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        raise DataError(
            "the pickle is not a state dict", where=str(path), value=type(content).__name__,
            allowed="names and tensors", fix="save the state dict alone",
        )  # fmt: skip
    return content
