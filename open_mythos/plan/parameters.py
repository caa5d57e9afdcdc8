"""The parameters of a job's model, read from the model itself on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from open_mythos.config import MythosConfig
from open_mythos.model.dense import DenseTransformer
from open_mythos.model.mythos import OpenMythos
from open_mythos.train.build import Model
from open_mythos.train.optimizers.optim import freeze_halting_gate, parameter_groups
from open_mythos.train.parallel.expert_parallel import expert_parameters
from open_mythos.train.parallel.parallelize import sharding_units

ROOT = ""
"""Unit of the parameters that only the outermost FSDP wrapper manages."""


@dataclass(frozen=True)
class Parameter:
    """A parameter and how training treats it.

    Attributes:
        name: Name in ``named_parameters()``.
        shape: Shape; sharding splits the first axis.
        unit: Name of the FSDP unit that is gathered as a whole, or :data:`ROOT`.
        regathered: Whether the unit is freed after its forward pass and gathered again.
        trained: Whether it has a gradient and optimizer state.
        expert: Whether it is a stack of routed experts, which expert parallelism splits.
        muon: Whether the optimizer "muon" updates it by Muon.
    """

    name: str
    shape: tuple[int, ...]
    unit: str
    regathered: bool
    trained: bool
    expert: bool
    muon: bool

    @property
    def n(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def chunk(self, processes: int) -> int:
        """Return the elements of a shard over ``processes``; FSDP2 pads all to the largest."""
        rows = self.shape[0]
        return -(-rows // processes) * (self.n // rows)


def build(cfg: MythosConfig, n_layers: int | None = None) -> Model:
    """Build the looped model, or the dense one of ``n_layers``, with a frozen halting gate."""
    model = OpenMythos(cfg) if n_layers is None else DenseTransformer(cfg, n_layers)
    freeze_halting_gate(model)
    return model


def parameters(cfg: MythosConfig, n_layers: int | None = None) -> list[Parameter]:
    """Return all parameters, tied ones once."""
    with torch.device("meta"):
        model = build(cfg, n_layers)
    names = {module: name for name, module in model.named_modules()}
    units = {names[unit]: regathered for unit, regathered in sharding_units(model)}
    experts = {id(each) for each in expert_parameters(model)}
    groups = [group for group in parameter_groups(model, 0.0, "muon") if "side_by_side" in group]
    muon = {name for group in groups for name, _ in group["params"]}
    found = []
    for name, each in model.named_parameters():
        unit = next((unit for unit in units if name.startswith(f"{unit}.")), ROOT)
        found.append(
            Parameter(
                name, tuple(each.shape), unit, units.get(unit, False), each.requires_grad,
                id(each) in experts, name in muon,
            )
        )  # fmt: skip
    return found
