"""Folders that every tool reads, and their upload to the Hugging Face hub."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from open_mythos.checks import checked
from open_mythos.errors import ConfigError, EnvironmentError_
from open_mythos.files import check_new_folder, write_text
from open_mythos.hub.averages import averaged_model
from open_mythos.hub.card import model_card
from open_mythos.hub.places import (
    first_line,
    is_hub_id,
    model_directory,
    tokenizer_beside,
    weights_of,
)
from open_mythos.hub.pretrained import from_pretrained, save_pretrained
from open_mythos.model.mythos import OpenMythos
from open_mythos.run_folder import GATE_FILE, ORIGIN_FILES, copy_depths, find_beside
from open_mythos.tokenizer import Tokenizer, load_tokenizer

CARD_FILE = "README.md"
_NO_HUB = "pip install 'open-mythos[data]'"


@checked
def export_folder(
    checkpoint: str | Path, out: str | Path, *, name: str = "", licence: str = "",
    tokenizer: Tokenizer | None = None, weights: str = "",
) -> Path:  # fmt: skip
    """Write a model as a folder that this library and ``transformers`` read.

    It holds configuration, weights, tokenizer, ``generation_config.json``, a model card and, where
    the checkpoint has them, the chat template, the records of the exit gate and of validated
    depths, and the origin.

    Args:
        checkpoint: Folder of a model, of a checkpoint or of a run (its newest checkpoint).
        out: Folder to write, new or empty.
        name: "owner/name" for the card; by default the folder's name.
        licence: Of the weights, such as "apache-2.0".
        tokenizer: By default the one stored with the model, if any.
        weights: See :func:`open_mythos.hub.places.weights_of`.

    Raises:
        ConfigError: ``out`` is not empty, the model has no loops, or it has no such weights.
        DataError: There is no model.
    """
    target = check_new_folder(out)
    folder = model_directory(checkpoint)
    is_averaged = weights_of(folder, weights) == "averaged"
    model = averaged_model(folder) if is_averaged else from_pretrained(folder)
    if tokenizer is None and (stored := tokenizer_beside(folder)) is not None:
        tokenizer = load_tokenizer(stored)
    save_pretrained(model, target, format="hf", tokenizer=tokenizer)
    assert isinstance(model, OpenMythos), "others have no such format"
    for file in (GATE_FILE, *ORIGIN_FILES):
        if (found := find_beside(folder, file)) is not None:
            shutil.copyfile(found, target / file)
    copy_depths(folder, target)
    card = model_card(model, name or target.name, folder, licence)
    write_text(target / CARD_FILE, card)
    return target


@checked
def push_to_hub(
    checkpoint: str | Path, name: str, *, private: bool = True, licence: str = "",
    message: str = "Upload model", token: str | None = None, weights: str = "",
) -> str:  # fmt: skip
    """Upload a model with a card that states its trained and validated depth.

    Args:
        checkpoint: See :func:`export_folder`.
        name: "owner/name"; made if missing.
        private: Whether a new repository is private.
        licence: Of the weights.
        message: Of the commit.
        token: Of the hub; by default the one that ``hf auth login`` stored.
        weights: See :func:`export_folder`.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: Not a name.
        EnvironmentError_: The hub cannot be reached, or refuses.
    """
    if not is_hub_id(name) or "@" in name:
        raise ConfigError(
            "not a name on the hub", where="push_to_hub", value=name, allowed="owner/name",
            fix="for a local folder use export_folder",
        )  # fmt: skip
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise EnvironmentError_(
            "the hub's client is not installed",
            where="push_to_hub",
            value=name,
            allowed="an installation with huggingface_hub",
            fix=_NO_HUB,
        ) from error
    with tempfile.TemporaryDirectory() as temporary:
        folder = export_folder(
            checkpoint, Path(temporary) / "model", name=name, licence=licence, weights=weights
        )
        try:
            api = HfApi(token=token)
            api.create_repo(name, private=private, exist_ok=True)
            commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
        except Exception as error:  # many types: the client's, its HTTP library's, OSError
            raise EnvironmentError_(
                f"the hub did not take the model: {first_line(error)}", where="push_to_hub",
                value=name, allowed="a repository that you may write to",
                fix="log in with `hf auth login`, or upload a folder of `open-mythos export`",
            ) from error  # fmt: skip
    return str(commit.commit_url)
