"""From a checkpoint back into a run, whatever number and kind of processes wrote it or read it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from open_mythos.errors import DataError
from open_mythos.hub.pretrained import CONFIG_FILE, describe, model_tensors
from open_mythos.hub.sharded_tensors import holds_parts, is_sharded, read_tensors, stored_shapes
from open_mythos.train.build import Model
from open_mythos.train.checkpoint.manifest import read_json
from open_mythos.train.checkpoint.snapshot import load_checkpoint, named_parameters
from open_mythos.train.optimizers.optim import moments_of

_OPTIMIZER = "optimizer/"


def restore(
    path: Path,
    model: Model,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Load the tensors of a verified checkpoint. All processes of a run call it together.

    Args:
        path: Folder of the checkpoint.
        model: Whole, replicated or sharded.
        optimizer: Of its parameters.
        extra: Further safetensors file -> name -> tensor to fill, sharded like the model.

    Raises:
        DataError: A file cannot be read, or belongs to another model. Nothing is changed if names
            and shapes do not fit.
    """
    if is_sharded(path) or holds_parts(model.state_dict()):
        _restore_parts(path, model, optimizer)
    else:
        load_checkpoint(path, model, optimizer)
    for file, tensors in extra.items():
        read_tensors(path, {f"{Path(file).stem}/{name}": each for name, each in tensors.items()})


def holds_file(path: Path, file: str) -> bool:
    """Whether the checkpoint has the tensors of ``file``, in one piece or in many."""
    return any(name.startswith(f"{Path(file).stem}/") for name in stored_shapes(path))


def _restore_parts(path: Path, model: Model, optimizer: torch.optim.Optimizer) -> None:
    stored = read_json(path / CONFIG_FILE)
    if stored != describe(model):
        raise DataError(
            "the checkpoint is of another model", where=str(path), value=stored,
            allowed=str(describe(model)), fix="build the model from the checkpoint's configuration",
        )  # fmt: skip
    weights = {f"model/{name}": tensor for name, tensor in model_tensors(model).items()}
    moments = _empty_moments(path, optimizer)
    into = weights | {
        f"{_OPTIMIZER}{name}/{key}": tensor
        for name, of_parameter in moments.items()
        for key, tensor in of_parameter.items()
    }
    read_tensors(path, into)
    names = [name for name, _ in named_parameters(optimizer)]
    optimizer.load_state_dict(
        {
            "state": {i: moments[name] for i, name in enumerate(names) if name in moments},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )


def _empty_moments(path: Path, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Parameter -> moment -> room for it, for all moments in the checkpoint."""
    parameters, kept = dict(named_parameters(optimizer)), moments_of(optimizer)
    moments: dict[str, dict[str, Tensor]] = {}
    for stored, shape in stored_shapes(path).items():
        if not stored.startswith(_OPTIMIZER):
            continue
        name, _, key = stored.removeprefix(_OPTIMIZER).rpartition("/")
        parameter = parameters.get(name)
        known = parameter is not None and key in kept[name]
        if parameter is None or not known or (shape and shape != parameter.shape):
            raise DataError(
                "the checkpoint has moments of another optimizer or model", where=str(path),
                value=f"{name}/{key} {tuple(shape)}", allowed="those that this run goes on with",
                fix="start a new run from the checkpoint's weights",
            )  # fmt: skip
        room = torch.zeros_like(parameter.detach()) if shape else torch.zeros(())
        moments.setdefault(name, {})[key] = room
    return moments
