"""Where models are: local folders, training runs, the hub (this module loads no torch)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from open_mythos.errors import DataError, EnvironmentError_
from open_mythos.run_folder import (
    CHECKPOINTS_FOLDER,
    GATE_FILE,
    ORIGIN_FILES,
    PROVENANCE_FILE,
    TOKENIZER_FOLDER,
    find_beside,
    step_folders,
)
from open_mythos.tokenizer import Tokenizer, load_tokenizer

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
"""Names the files of weights that ``transformers`` stored in several."""
SHARDS = "shard-*.safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def stored_tokenizer(directory: str | Path) -> Tokenizer:
    """Load the tokenizer stored with a model or with its training run.

    Raises:
        DataError: There is no model or no tokenizer.
    """
    found = tokenizer_beside(model_directory(directory))
    if found is None:
        raise DataError(
            f"no {TOKENIZER_FOLDER} is stored with the model", where=str(directory),
            value=TOKENIZER_FOLDER,
            allowed=f"a folder {TOKENIZER_FOLDER} beside the model or in its run",
            fix="name one with --tokenizer",
        )  # fmt: skip
    return load_tokenizer(found)


def tokenizer_beside(model_folder: Path) -> Path | None:
    """Return the folder of a model's tokenizer: its own or its run's, or that of the model itself.

    The last is where ``transformers`` stores one.
    """
    own = model_folder if (model_folder / "tokenizer.json").is_file() else None
    return find_beside(model_folder, TOKENIZER_FOLDER) or own


def first_id(tokenizer: Tokenizer, directory: str | Path) -> int:
    """Return the token in front of an empty prompt: the one that stands between documents.

    A converted model begins with its own bos.
    """
    converted = find_beside(model_directory(directory), PROVENANCE_FILE) is not None
    return tokenizer.bos_id if converted else tokenizer.eos_id


def model_directory(directory: str | Path) -> Path:
    """Resolve ``directory`` to the folder of a model, as :func:`from_pretrained` does.

    Raises:
        DataError: There is no model.
        EnvironmentError_: The hub cannot be reached, or has no such model.
    """
    folder = Path(directory)
    if not folder.exists() and is_hub_id(directory) and not folder.parent.is_dir():
        return _download(str(directory))
    if not folder.is_dir():
        raise DataError(
            "no model there", where="from_pretrained", value=str(directory),
            allowed=f"a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, a training run, owner/name",
            fix="check the path; a model on the hub has the form owner/name",
        )  # fmt: skip
    if _holds_model(folder):
        return folder
    for parent in (folder, folder / CHECKPOINTS_FOLDER):
        steps = [path for _, path in step_folders(parent) if _holds_model(path)]
        if steps:
            return steps[-1]
    raise DataError(
        "the folder holds no model", where="from_pretrained", value=str(directory),
        allowed=f"{CONFIG_FILE} and {WEIGHTS_FILE} in it or in its newest checkpoint",
        fix="pickled weights (.bin, .pt, .pth) are never read: convert them to safetensors first",
    )  # fmt: skip


def is_hub_id(name: str | Path) -> bool:
    """Return whether ``name`` has the form "owner/name"."""
    return isinstance(name, str) and _HUB_ID.fullmatch(name) is not None


def _holds_model(folder: Path) -> bool:
    if not (folder / CONFIG_FILE).is_file():
        return False
    if (folder / WEIGHTS_FILE).is_file() or (folder / INDEX_FILE).is_file():
        return True
    return is_sharded(folder)


def download(model_id: str, patterns: Sequence[str], *, where: str, verb: str = "load") -> Path:
    """Return a folder with the files of a hub model that match ``patterns``.

    Args:
        model_id: "owner/name".
        patterns: Names of files, with wildcards.
        where: What names the model, for the message.
        verb: What can be done with a folder, for the message.

    Raises:
        EnvironmentError_: The hub cannot be reached, or has no such model.
    """
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model_id, allow_patterns=list(patterns)))
    except Exception as error:  # many types: the client's, its HTTP library's, OSError
        raise EnvironmentError_(
            f"neither a local folder nor an accessible model on the hub: {first_line(error)}",
            where=where, value=model_id, allowed="an existing folder or hub model",
            fix=f"check the name, or {verb} DIR after: hf download {model_id} --local-dir DIR",
        ) from error  # fmt: skip


def first_line(error: Exception) -> str:
    """Return the first line of a message, or the type of an error without one."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _download(model_id: str) -> Path:
    files = [
        CONFIG_FILE, INDEX_FILE, "model*.safetensors", "tokenizer*.json", f"{TOKENIZER_FOLDER}/*",
        GATE_FILE, *ORIGIN_FILES,
    ]  # fmt: skip
    folder = download(model_id, files, where="from_pretrained")
    if not _holds_model(folder):
        raise DataError(
            "the hub's model was not saved by this library", where="from_pretrained",
            value=model_id, allowed=f"{CONFIG_FILE} and {WEIGHTS_FILE}",
            fix="load models of other libraries with the library that saved them",
        )  # fmt: skip
    return folder


def is_sharded(folder: str | Path) -> bool:
    """Return whether ``folder`` holds sharded tensors."""
    return any(Path(folder).glob(SHARDS))
