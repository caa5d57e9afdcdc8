"""Save and load models as ``config.json`` and ``model.safetensors``.

Loading is strict and executes nothing: the configuration is JSON with known keys only, and the
weights are safetensors with exactly the model's tensors. Pickles are never read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from open_mythos.checks import checked, is_int, pick
from open_mythos.config import MythosConfig
from open_mythos.devices import resolve_device
from open_mythos.errors import ConfigError, DataError
from open_mythos.files import (
    open_safetensors,
    read_object,
    refuse_link,
    replacing,
    sync_to_disk,
    write_text,
)
from open_mythos.hub import transformers_format as outer
from open_mythos.hub.places import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    model_directory,
    read_index,
)
from open_mythos.model.dense import DenseTransformer
from open_mythos.model.mythos import OpenMythos
from open_mythos.run_folder import TOKENIZER_FOLDER
from open_mythos.tokenizer.interface import Tokenizer

FORMAT = 1
LIBRARY = "open-mythos"

_KEYS = {"looped": {"format", "library", "architecture", "config"}}
_KEYS["dense"] = {*_KEYS["looped"], "n_layers"}
_WRAPPERS = ("_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_IN_SHARDS = "model/"
_FLOATS = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64
}  # fmt: skip
_MAX_CONFIG_BYTES = 1 << 20
_UNSAVED = "the model cannot be saved"
_SAVE_AGAIN = "copy the folder again, or save the model again with save_pretrained"


@checked
def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    *,
    format: str = "native",
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write ``config.json`` and ``model.safetensors`` into ``directory``, created if missing.

    Writes are atomic: each file is written beside its place, fsynced, then renamed. A tied head is
    left out.

    Args:
        model: The model; its weights keep their dtype.
        directory: Target; files of the same names are replaced.
        format: "native", or "hf": ``transformers`` reads the folder too, with
            ``trust_remote_code=True`` or after :func:`open_mythos.hf.register`. Looped models only.
        tokenizer: Stored with the model, where each of the readers looks for it.

    Raises:
        ConfigError: The format is unknown or has no form of this model, or the model could not be
            loaded again: it holds other tensors than its configuration says, or ones that are not
            finite.
        EnvironmentError_: A file cannot be written.
    """
    pick(("native", "hf"), format, "save_pretrained(format)", what="format")
    model = unwrapped(model)
    target, tensors, config = Path(directory), model_tensors(model), describe(model)
    _check_complete(model, tensors)
    texts: dict[str, str] = {}
    if format == "hf":
        config = _describe_outer(model, tokenizer)
        tensors = {outer.to_outer(name): tensor for name, tensor in tensors.items()}
        texts[outer.AUTO_FILE] = outer.AUTO_TEXT
        texts[outer.GENERATION_FILE] = _as_json(outer.describe_generation(tokenizer))
    texts[CONFIG_FILE] = _as_json(config)
    with replacing(target / WEIGHTS_FILE, _UNSAVED) as path:
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:  # of the disk, mostly
            raise OSError(str(error)) from error
        # safetensors creates files that only their owner can read
        path.chmod(target.stat().st_mode & 0o666)
    for name, text in texts.items():
        write_text(target / name, text, _UNSAVED)
    if tokenizer is not None and format == "hf":
        outer.save_tokenizer(tokenizer, target)
    elif tokenizer is not None:
        refuse_link(target / TOKENIZER_FOLDER, _UNSAVED)
        tokenizer.save(target / TOKENIZER_FOLDER)
    sync_to_disk(target)


@checked
def from_pretrained(
    directory: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> OpenMythos | DenseTransformer:
    """Load a model written by :func:`save_pretrained` or a checkpoint, in evaluation mode.

    Args:
        directory: A folder with ``config.json`` and ``model.safetensors`` or the shards of a
            distributed run; a training run or its ``checkpoints`` folder (newest checkpoint); or
            ``"owner/name"`` or ``"owner/name@revision"`` on the Hugging Face hub, unless that is
            a local folder.
        device: Device of the weights.
        dtype: Of the parameters; as stored by default. Buffers are float32.

    Raises:
        DataError: A file is missing, corrupted or malicious, its tensors are not exactly those of
            the model (the first few differences are listed), or a value is not finite.
        ConfigError: The device or the dtype is none.
        EnvironmentError_: The hub cannot be reached, or has no such model or device.
    """
    if isinstance(device, str):
        device = resolve_device(device)
    if dtype is not None and dtype not in _FLOATS.values():
        raise ConfigError(
            "not a dtype of weights", where="from_pretrained(dtype)", value=dtype,
            allowed=", ".join(map(str, _FLOATS.values())), fix="pass dtype=torch.bfloat16",
        )  # fmt: skip
    folder = model_directory(directory)
    if (folder / WEIGHTS_FILE).is_file():
        model, tensors = _read_files(folder, {WEIGHTS_FILE})
    elif (folder / INDEX_FILE).is_file():
        model, tensors = _read_files(folder, set(read_index(folder / INDEX_FILE).values()))
    else:
        model, tensors = _read_shards(folder)
    dtypes: dict[str, torch.dtype | None] = dict.fromkeys(dict(model.named_parameters()), dtype)
    dtypes |= {name: buffer.dtype for name, buffer in model.named_buffers()}
    for name, tensor in tensors.items():
        # copies: truncating a mapped file would kill the process
        tensors[name] = tensor.to(device, dtypes.get(name), copy=True)
    _check_finite(tensors, folder)
    _check_dtypes(tensors, dtypes, folder)
    if model.cfg.tie_embeddings:
        tensors["head.weight"] = tensors["embedding.weight"]
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _read_files(
    folder: Path, names: Iterable[str]
) -> tuple[OpenMythos | DenseTransformer, dict[str, Tensor]]:
    """Read a model stored whole, in one file or several, under names of either format."""
    with ExitStack() as stack:
        files: dict[str, tuple[Any, str]] = {}
        for name in sorted(names):
            file = stack.enter_context(open_safetensors(folder / name))
            files |= {name: (file, name) for name in file.keys()}  # noqa: SIM118
        if any(name.startswith(outer.CORE) for name in files):
            files = {outer.to_inner(name): each for name, each in files.items()}
        slices = {name: file.get_slice(stored) for name, (file, stored) in files.items()}
        model = _skeleton(folder / CONFIG_FILE, len(slices))
        _check_tensors(model_tensors(model), slices, folder)
        return model, {name: file.get_tensor(stored) for name, (file, stored) in files.items()}


def _read_shards(folder: Path) -> tuple[OpenMythos | DenseTransformer, dict[str, Tensor]]:
    from open_mythos.hub.sharded_tensors import read_tensors, stored_shapes

    names = {name for name in stored_shapes(folder) if name.startswith(_IN_SHARDS)}
    model = _skeleton(folder / CONFIG_FILE, len(names))
    expected = {f"{_IN_SHARDS}{name}": each for name, each in model_tensors(model).items()}
    for name in sorted(expected.keys() ^ names):
        raise DataError(
            "the shards are not those of the configuration", where=str(folder), value=name,
            allowed=f"exactly the {len(expected)} tensors of the model",
            fix="copy the checkpoint again",
        )  # fmt: skip
    tensors = {name: torch.empty_like(each, device="cpu") for name, each in expected.items()}
    read_tensors(folder, tensors)
    return model, {name.removeprefix(_IN_SHARDS): each for name, each in tensors.items()}


def _check_complete(model: OpenMythos | DenseTransformer, tensors: Mapping[str, Tensor]) -> None:
    """Raise ConfigError unless :func:`from_pretrained` will read ``tensors`` as ``model``."""
    with torch.device("meta"):
        plain: OpenMythos | DenseTransformer
        if isinstance(model, DenseTransformer):
            plain = DenseTransformer(model.cfg, model.n_layers)
        else:
            plain = OpenMythos(model.cfg)
    expected = {name: tensor.shape for name, tensor in model_tensors(plain).items()}
    differing = [
        name for name in sorted(expected.keys() | tensors.keys())
        if name not in tensors or tensors[name].shape != expected.get(name)
    ]  # fmt: skip
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if differing or bad:
        raise ConfigError(
            "the model's tensors are not those of its configuration" if differing
            else "weights are not finite",
            where="save_pretrained(model)", value=(differing or bad)[:5],
            allowed=f"exactly {len(expected)} tensors of finite numbers",
            fix="merge adapters, undo other changes of its modules, or correct its cfg"
            if differing else "save the model before it diverges",
        )  # fmt: skip


def describe(model: OpenMythos | DenseTransformer) -> dict[str, Any]:
    """Return the content of ``config.json``: what is needed to build ``model``, untrained."""
    return {
        "format": FORMAT,
        "library": LIBRARY,
        "architecture": "dense" if isinstance(model, DenseTransformer) else "looped",
        "config": model.cfg.to_dict(),
        **({"n_layers": model.n_layers} if isinstance(model, DenseTransformer) else {}),
    }


def _as_json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


def _describe_outer(
    model: OpenMythos | DenseTransformer, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Return the content of ``config.json`` in the format of ``transformers``."""
    if isinstance(model, DenseTransformer):
        raise ConfigError(
            "a dense model has no form in this format", where="save_pretrained(format)",
            value="hf", allowed="looped models", fix='leave format out, or pass "native"',
        )  # fmt: skip
    dtype = str(model.final_norm.weight.dtype).removeprefix("torch.")
    return outer.describe_flat(model.cfg, dtype, **outer.special_ids(tokenizer))


def model_tensors(model: OpenMythos | DenseTransformer) -> dict[str, Tensor]:
    """Return name -> tensor of everything that is saved; a tied weight once.

    Wrappers such as those of ``torch.compile`` leave no trace in the names.

    Raises:
        ConfigError: Head and embedding of a tied model are two different tensors.
    """
    model = unwrapped(model)
    state = {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): tensor.detach()
        for name, tensor in model.state_dict().items()
    }
    if model.cfg.tie_embeddings:
        model.check_tied()
        del state["head.weight"]
    return {name: tensor.contiguous() for name, tensor in state.items()}


def unwrapped(model: nn.Module) -> OpenMythos | DenseTransformer:
    """Return the model inside of ``torch.compile`` and of data parallelism.

    Raises:
        ConfigError: There is none of this library.
    """
    inner: nn.Module | None = model
    while isinstance(inner, nn.Module) and not isinstance(inner, OpenMythos | DenseTransformer):
        inner = next((inner._modules[name] for name in _WRAPPERS if name in inner._modules), None)
    if inner is None or not isinstance(inner, OpenMythos | DenseTransformer):
        raise ConfigError(
            "not a model of this library", where="model", value=type(model).__name__,
            allowed="OpenMythos or DenseTransformer, compiled or not",
            fix="pass the model itself",
        )  # fmt: skip
    return inner


def _skeleton(path: Path, n_tensors: int) -> OpenMythos | DenseTransformer:
    """Build the model that ``config.json`` describes, on the meta device.

    A configuration with more layers than there are tensors is rejected first: building a malicious
    one could take forever.
    """
    config, n_layers = read_model_config(path)
    looped = config.prelude_layers + config.recurrent_layers + config.coda_layers
    layers = looped if n_layers is None else n_layers
    if not 0 < layers <= n_tensors:
        allowed = f"1 .. {n_tensors}, the tensors in {WEIGHTS_FILE}"
        raise _unfit(path, "has more layers than the weights", layers, allowed)
    try:
        with torch.device("meta"):
            return OpenMythos(config) if n_layers is None else DenseTransformer(config, n_layers)
    except (RuntimeError, OverflowError, TypeError) as error:
        allowed = "sizes that tensors can have"
        raise _unfit(path, "describes no possible model", str(error), allowed) from error


def read_model_config(path: Path) -> tuple[MythosConfig, int | None]:
    """Read the ``config.json`` of a model folder, in either format.

    Returns:
        The configuration, and the number of layers of a dense model.

    Raises:
        DataError: It is of another library or format, or a value is out of range.
    """
    values = read_object(path, "the configuration is not readable", _SAVE_AGAIN, _MAX_CONFIG_BYTES)
    is_outer = values.get("model_type") == outer.MODEL_TYPE
    if not is_outer:
        _check_keys(path, values)
    try:
        config = outer.from_flat(values) if is_outer else MythosConfig.from_dict(values["config"])
    except ConfigError as error:
        raise DataError(
            error.what, where=f"{path}: {error.where}", value=error.value,
            allowed=error.allowed, fix=error.fix or _SAVE_AGAIN,
        ) from error  # fmt: skip
    return config, None if is_outer else values.get("n_layers")


def _check_keys(path: Path, values: dict[str, Any]) -> None:
    architecture = values.get("architecture")
    for key, choices in (("format", [FORMAT]), ("library", [LIBRARY]), ("architecture", [*_KEYS])):
        if values.get(key) not in choices:
            allowed = " or ".join(repr(choice) for choice in choices)
            raise _unfit(path, f"is of another {key}", values.get(key), allowed)
    expected = _KEYS[str(architecture)]
    if set(values) != expected:
        differing = sorted(set(values) ^ expected)
        raise _unfit(path, "has missing or unknown keys", differing, ", ".join(sorted(expected)))
    if not isinstance(values["config"], dict):
        raise _unfit(path, "holds no fields", values["config"], "an object of fields")
    if not is_int(values.get("n_layers", 0)):
        raise _unfit(path, "has no number of layers", values["n_layers"], "an integer")


def _check_finite(tensors: Mapping[str, Tensor], folder: Path) -> None:
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise DataError(
            f"{len(bad)} of {len(tensors)} weights are not finite", where=str(folder),
            value=bad[:5], allowed="finite numbers",
            fix="take an earlier checkpoint, or one in a dtype that holds the weights",
        )  # fmt: skip


def _check_dtypes(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, object], folder: Path
) -> None:
    """Check that the parameters that meet in products have one dtype."""
    kinds: dict[torch.dtype, str] = {}
    for name, tensor in tensors.items():
        if name in wanted and wanted[name] is None and not _OWN_DTYPE.search(name):
            kinds.setdefault(tensor.dtype, name)
    if len(kinds) > 1:
        raise DataError(
            "the weights have several dtypes", where=str(folder),
            value={name: str(dtype) for dtype, name in kinds.items()}, allowed="one dtype",
            fix="load them with from_pretrained(dtype=torch.float32) and save the model again",
        )  # fmt: skip


_OWN_DTYPE = re.compile(r"(^|\.)(injection|halting)\.")
"""Parameters that are used in float32 whatever their dtype."""


def _unfit(path: Path, what: str, value: Any, allowed: str) -> DataError:
    return DataError(
        f"the configuration {what}", where=str(path), value=value, allowed=allowed, fix=_SAVE_AGAIN
    )


def _check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Any], path: Path) -> None:
    """Check the slices of a file before any is read."""
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    for name in sorted(expected.keys() & found.keys()):
        shape, dtype = list(found[name].get_shape()), found[name].get_dtype()
        if shape != list(expected[name].shape):
            problems.append(f"{name} is {shape}, not {list(expected[name].shape)}")
        if dtype not in _FLOATS:
            problems.append(f"{name} is {dtype}, not {' or '.join(_FLOATS)}")
    if len(problems) > 5:
        problems[5:] = [f"and {len(problems) - 5} more"]
    if problems:
        raise DataError(
            f"the weights do not match the configuration: {'; '.join(problems)}", where=str(path),
            value=f"{len(found)} tensors",
            allowed=f"exactly the {len(expected)} tensors of the model",
            fix=f"load weights with the {CONFIG_FILE} they were saved with",
        )  # fmt: skip
