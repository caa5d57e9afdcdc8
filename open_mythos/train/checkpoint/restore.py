"""Load a checkpoint into a run, independent of the number of processes that wrote it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_mythos.checks import checked
from open_mythos.config import MythosConfig
from open_mythos.errors import DataError, MythosError
from open_mythos.hub.places import CONFIG_FILE
from open_mythos.hub.pretrained import describe, model_tensors
from open_mythos.hub.sharded_tensors import read_tensors, stored_shapes
from open_mythos.run_folder import STATE_FILE
from open_mythos.train.build import Model
from open_mythos.train.checkpoint.find import read_state
from open_mythos.train.checkpoint.manifest import read_json
from open_mythos.train.checkpoint.snapshot import Extra, named_parameters
from open_mythos.train.optimizers.optim import state_names

_MODEL, _OPTIMIZER = "model/", "optimizer/"


@checked
def load_checkpoint(
    path: str | Path, model: Model, optimizer: torch.optim.Optimizer, extra: Extra | None = None
) -> dict[str, Any]:
    """Load a verified checkpoint into ``model`` and ``optimizer``; return its state.

    A collective call. ``model`` may be replicated or sharded; the tensors of ``extra`` are filled.

    Raises:
        DataError: A file cannot be read or belongs to another model. Nothing is changed unless
            names and shapes match.
    """
    folder = Path(path)
    shapes = stored_shapes(folder)
    into = {f"{_MODEL}{name}": tensor for name, tensor in model_tensors(model).items()}
    _check_model(folder, model, into.keys() ^ {n for n in shapes if n.startswith(_MODEL)})
    state = _empty_state(folder, optimizer, shapes)
    for name, of_parameter in state.items():
        into |= {f"{_OPTIMIZER}{name}/{key}": each for key, each in of_parameter.items()}
    for file, tensors in (extra or {}).items():
        into |= {f"{Path(file).stem}/{name}": each for name, each in tensors.items()}
    read_tensors(folder, into)
    names = [name for name, _ in named_parameters(optimizer)]
    optimizer.load_state_dict(
        {
            "state": {i: state[name] for i, name in enumerate(names) if name in state},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )
    return read_state(folder)


@contextmanager
def state_read(path: Path) -> Iterator[None]:
    """Raise DataError where the content of a checkpoint's ``state.json`` is not as written."""
    try:
        yield
    except MythosError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise DataError(
            "the state of the run is not as it was written", where=str(path / STATE_FILE),
            value=f"{type(error).__name__}: {error}", allowed="what a run wrote",
            fix="resume from another checkpoint",
        ) from error  # fmt: skip


def holds_file(path: Path, file: str) -> bool:
    """Return whether the checkpoint has the tensors of ``file``, whole or in shards."""
    return any(name.startswith(f"{Path(file).stem}/") for name in stored_shapes(path))


def _check_model(folder: Path, model: Model, unmatched: set[str]) -> None:
    """Raise DataError unless the checkpoint holds this model, without ``unmatched`` tensors."""
    stored, present = read_json(folder / CONFIG_FILE), describe(model)
    if isinstance(stored.get("config"), dict):
        # fields that were added after the checkpoint was written have their defaults
        stored["config"] = MythosConfig.from_dict(stored["config"]).to_dict()
    if stored != present or unmatched:
        raise DataError(
            "the checkpoint is of another model", where=str(folder),
            value=stored if stored != present else sorted(unmatched)[:5], allowed=str(present),
            fix="build the model from the checkpoint's configuration",
        )  # fmt: skip


def _empty_state(
    folder: Path, optimizer: torch.optim.Optimizer, shapes: Mapping[str, torch.Size]
) -> dict[str, dict[str, Tensor]]:
    """Return parameter -> key -> zeros for all optimizer state in the checkpoint."""
    parameters, known = dict(named_parameters(optimizer)), state_names(optimizer)
    state: dict[str, dict[str, Tensor]] = {}
    for stored, shape in shapes.items():
        if not stored.startswith(_OPTIMIZER):
            continue
        name, _, key = stored.removeprefix(_OPTIMIZER).rpartition("/")
        parameter = parameters.get(name)
        if parameter is None or key not in known[name] or (shape and shape != parameter.shape):
            raise DataError(
                "the checkpoint has the state of another optimizer or model", where=str(folder),
                value=f"{name}/{key} {tuple(shape)}", allowed="that of this run's optimizer",
                fix="start a new run from the checkpoint's weights",
            )  # fmt: skip
        empty = torch.zeros_like(parameter.detach()) if shape else torch.zeros(())
        state.setdefault(name, {})[key] = empty
    return state
