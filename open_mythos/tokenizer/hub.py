"""Tokenizers of the Hugging Face hub."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_mythos.checks import checked
from open_mythos.errors import DataError, EnvironmentError_
from open_mythos.tokenizer.files import is_path, read_local
from open_mythos.tokenizer.interface import SPECIALS
from open_mythos.tokenizer.rust_backed import RustBacked

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

DEFAULT_MODEL_ID = "openai/gpt-oss-20b"
CONNECT_TIMEOUT_S = 10.0


class MythosTokenizer(RustBacked):
    """The tokenizer of a Hugging Face model, or a local one.

    A hub name is loaded by ``transformers.AutoTokenizer``, from the local cache if possible; remote
    code is never run. A path (a ``tokenizer.json``, or a folder with one) needs neither
    transformers nor a network. If bos, eos or pad is missing or shares an id, ``<|bos|>``,
    ``<|eos|>`` or ``<|pad|>`` is added after the other ids; eos keeps a shared id before bos, and
    bos before pad.

    Args:
        model_id: A name on the hub, or a path.

    Raises:
        DataError: The path does not exist or holds no tokenizer.
        EnvironmentError_: transformers is missing, the hub has no such model, or is unreachable.
    """

    @checked
    def __init__(self, model_id: str | Path = DEFAULT_MODEL_ID) -> None:
        source = read_local(Path(model_id)) if is_path(model_id) else _read_hub(str(model_id))
        super().__init__(*source)


def _read_hub(model_id: str) -> tuple[RustTokenizer, str, dict[str, str]]:
    hf = _auto_tokenizer(model_id)
    rust = getattr(hf, "backend_tokenizer", None)
    if rust is None:
        raise DataError(
            "the model's tokenizer does not run in the `tokenizers` library", where="model_id",
            value=model_id,
            allowed="tokenizers with a tokenizer.json",
            fix="pass a model with a tokenizer.json, or train a BPETokenizer",
        )  # fmt: skip
    tokens = {role: getattr(hf, f"{role}_token", None) for role in SPECIALS}
    return rust, model_id, {role: str(token) for role, token in tokens.items() if token}


def _auto_tokenizer(model_id: str) -> Any:
    try:
        from huggingface_hub import constants, get_session
        from transformers import AutoTokenizer
    except ImportError as error:
        raise _unavailable(model_id, "transformers is not installed") from error
    load = partial(AutoTokenizer.from_pretrained, model_id, trust_remote_code=False)
    try:
        return load(local_files_only=True)
    except Exception:  # transformers raises many kinds
        pass
    try:
        # without a connection transformers would retry for a minute
        get_session().head(constants.ENDPOINT, timeout=CONNECT_TIMEOUT_S)
    except Exception as error:
        reason = f"it is not cached, and {constants.ENDPOINT} cannot be reached ({error})"
        raise _unavailable(model_id, reason) from error
    try:
        return load()
    except Exception as error:
        raise _unavailable(model_id, str(error).partition("\n")[0]) from error


def _unavailable(model_id: str, reason: str) -> EnvironmentError_:
    return EnvironmentError_(
        f"the tokenizer cannot be loaded: {reason}",
        where="MythosTokenizer(model_id)", value=model_id,
        allowed="a public model on the Hugging Face hub, or a local path",
        fix="pip install open-mythos[hf] and connect once to fill the cache; or pass the path of a "
        'tokenizer.json; or use the built-in tokenizer "byte" (ByteTokenizer)',
    )  # fmt: skip
