"""The averaged weights that a run with ``optim.ema_decay`` keeps beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from open_mythos.checks import checked
from open_mythos.errors import DataError
from open_mythos.hub.pretrained import from_pretrained
from open_mythos.hub.sharded_tensors import read_tensors, stored_shapes
from open_mythos.model.causal_lm import CausalLM
from open_mythos.run_folder import AVERAGE_FILE

UPDATES = "updates"
"""Key of the number of updates, next to the names of the weights."""


@checked
def averaged_model(checkpoint: str | Path) -> CausalLM:
    """Load the model of a verified checkpoint with the averaged weights, on the CPU.

    Raises:
        DataError: The checkpoint holds no averages, or they are not of its model.
    """
    folder = Path(checkpoint)
    prefix = f"{Path(AVERAGE_FILE).stem}/"
    stored = {
        name: torch.empty(shape)
        for name, shape in stored_shapes(folder).items()
        if name.startswith(prefix)
    }
    if not stored:
        raise DataError(
            "the checkpoint holds no averaged weights", where=str(folder), value="none",
            allowed="a checkpoint of a run with optim.ema_decay > 0",
            fix="use the weights themselves",
        )  # fmt: skip
    read_tensors(folder, stored)
    model = from_pretrained(folder)
    # the halting gate is frozen during training, but not in a loaded model
    weights = {
        name: each for name, each in averaged_weights(model).items() if "halting." not in name
    }
    averages = {name.removeprefix(prefix): each for name, each in stored.items()}
    check_fit(averages, weights)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(averages[name])
    return model


def averaged_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return trained parameters and router biases by name, in the order of the model."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return trained | {
        name: buffer for name, buffer in model.named_buffers() if name.endswith("router_bias")
    }


def check_fit(state: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Raise DataError unless ``state`` holds averages of exactly these weights."""
    expected = {name: tuple(weight.shape) for name, weight in weights.items()} | {UPDATES: ()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise DataError(
                "the averages are not of this model's weights", where=name,
                value=found.get(name, "missing"), allowed=str(expected.get(name, "no such weight")),
                fix="resume from a checkpoint of this model that was saved with an average",
            )  # fmt: skip
