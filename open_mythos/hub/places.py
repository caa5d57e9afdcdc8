"""Where models are: local folders, training runs, the hub (this module loads no torch)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_mythos.checks import is_int, pick
from open_mythos.errors import ConfigError, DataError, EnvironmentError_
from open_mythos.files import open_safetensors, read_object
from open_mythos.run_folder import (
    AVERAGE_FILE,
    CHECKPOINTS_FOLDER,
    DEPTHS_FILE,
    GATE_FILE,
    ORIGIN_FILES,
    PROVENANCE_FILE,
    TOKENIZER_FOLDER,
    find_beside,
    step_folders,
)
from open_mythos.tokenizer import Tokenizer, load_tokenizer
from open_mythos.tokenizer.interface import padded_to
from open_mythos.tokenizer.rust_backed import MOST_IDS

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
"""Names the files of weights that ``transformers`` stored in several."""
SHARDS = "shard-*.safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[A-Za-z0-9][\w./-]*)?")


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
    return padded_to(load_tokenizer(found), _vocab_size(model_directory(directory)))


def tokenizer_of_model(tokenizer: Tokenizer, model: str, where: str) -> Tokenizer:
    """Return the ``tokenizer`` of a text for the stored ``model``, if it is named.

    Raises:
        DataError: Another tokenizer is stored with the model.
    """
    if not model:
        return tokenizer
    folder = model_directory(model)
    stored = tokenizer_beside(folder)
    if stored is not None and load_tokenizer(stored).fingerprint != tokenizer.fingerprint:
        raise DataError(
            "the text has another tokenizer than the model", where=where, value=tokenizer.name,
            allowed=load_tokenizer(stored).name, fix=f"use that of the model: --tokenizer {stored}",
        )  # fmt: skip
    return padded_to(tokenizer, _vocab_size(folder))


def _vocab_size(folder: Path) -> int:
    """Return the number of ids of the model in ``folder``; 0 if its configuration is damaged."""
    try:
        values = read_object(folder / CONFIG_FILE, "the configuration is not readable")
    except DataError:  # said by whoever loads the model
        return 0
    own = values.get("config", values)
    size: Any = own.get("vocab_size") if isinstance(own, dict) else 0
    return size if is_int(size) and size <= MOST_IDS else 0


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
    if not str(directory) or not folder.is_dir():  # Path("") would be the present folder
        raise DataError(
            "no model there", where="from_pretrained", value=str(directory),
            allowed=f"a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, a training run, owner/name",
            fix="check the path; a model on the hub is owner/name or owner/name@revision",
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
    """Return whether ``name`` has the form "owner/name" or "owner/name@revision"."""
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
        model_id: "owner/name", or "owner/name@revision" with a branch, a tag or a commit.
        patterns: Names of files, with wildcards.
        where: What names the model, for the message.
        verb: What can be done with a folder, for the message.

    Raises:
        EnvironmentError_: The hub cannot be reached, or has no such model.
    """
    try:
        from huggingface_hub import snapshot_download

        name, _, revision = model_id.partition("@")
        files = list(patterns)
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=files))
    except Exception as error:  # many types: the client's, its HTTP library's, OSError
        raise EnvironmentError_(
            f"neither a local folder nor an accessible model on the hub: {first_line(error)}",
            where=where, value=model_id, allowed="an existing folder or hub model",
            fix=f"check name and revision, or {verb} DIR after: "
            f"hf download {model_id.partition('@')[0]} --local-dir DIR",
        ) from error  # fmt: skip


def first_line(error: Exception) -> str:
    """Return the first line of a message, or the type of an error without one."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _download(model_id: str) -> Path:
    files = [
        CONFIG_FILE, INDEX_FILE, "model*.safetensors", "tokenizer*.json", f"{TOKENIZER_FOLDER}/*",
        GATE_FILE, DEPTHS_FILE, *ORIGIN_FILES,
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


def read_index(path: Path) -> dict[str, str]:
    """Return tensor -> name of its file, from an index of safetensors files in the same folder.

    Raises:
        DataError: The file is no index, or lists files elsewhere.
    """
    fix = "copy the folder again"
    listed = read_object(path, "the index of the weights is not readable", fix)
    files = listed.get("weight_map")
    if not isinstance(files, dict) or not files or not all(
        isinstance(file, str) and file == Path(file).name for file in files.values()
    ):  # fmt: skip
        raise DataError(
            "not an index of weights", where=str(path), value=listed,
            allowed="weight_map: tensor -> file of this folder", fix=fix,
        )  # fmt: skip
    return files


def weights_of(model_folder: Path, wanted: str = "") -> str:
    """Return the weights of a stored model that are used: "averaged" or "raw".

    Args:
        model_folder: Folder of the model.
        wanted: One of the two; "" for the averages where the run keeps them, as the run's own
            evaluations use them.

    Raises:
        ConfigError: It is neither, or there are no averages.
        DataError: A file of weights cannot be read.
    """
    pick(("", "raw", "averaged"), wanted, "--weights", what="kind of weights")
    if wanted == "raw":
        return "raw"
    if (model_folder / AVERAGE_FILE).is_file() or _holds_sharded_averages(model_folder):
        return "averaged"
    if wanted:
        raise ConfigError(
            "the model holds no averaged weights", where="--weights", value=wanted,
            allowed="a checkpoint of a run with optim.ema_decay > 0", fix="use --weights raw",
        )  # fmt: skip
    return "raw"


def _holds_sharded_averages(folder: Path) -> bool:
    prefix = f"{Path(AVERAGE_FILE).stem}/"
    for path in folder.glob(SHARDS):
        with open_safetensors(path, "numpy") as file:
            if any(name.startswith(prefix) for name in file.keys()):  # noqa: SIM118
                return True
    return False
