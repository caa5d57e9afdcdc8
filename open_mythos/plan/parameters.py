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
"""The outermost sharding unit: what belongs to no other."""


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        name: Its name in ``named_parameters()``.
        shape: Its axes; sharding divides the first.
        unit: Name of the module that is gathered as a whole, or :data:`ROOT`.
        regathered: Whether the unit is freed after its forward pass and gathered again.
        trained: Whether it has a gradient and optimizer state.
        expert: Whether it is a stack of routed experts, which expert parallelism divides.
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
        """Elements."""
        return prod(self.shape)

    def chunk(self, processes: int) -> int:
        """Elements of the largest shard over ``processes``; FSDP2 pads every shard to it."""
        rows = self.shape[0]
        return -(-rows // processes) * (self.n // rows)


def model_on_meta(cfg: MythosConfig, n_layers: int | None = None) -> Model:
    """Build the looped model, or the dense one of ``n_layers``, on the meta device."""
    with torch.device("meta"):
        return OpenMythos(cfg) if n_layers is None else DenseTransformer(cfg, n_layers)


def parameters(cfg: MythosConfig, n_layers: int | None = None) -> list[Parameter]:
    """Return all parameters, tied ones once."""
    model = model_on_meta(cfg, n_layers)
    freeze_halting_gate(model)
    names = {id(module): name for name, module in model.named_modules()}
    units = {names[id(unit)]: regathered for unit, regathered in sharding_units(model)}
    experts = {id(each) for each in expert_parameters(model)}
    muon = {
        name
        for group in parameter_groups(model, 0.0, "muon")
        if "side_by_side" in group
        for name, _ in group["params"]
    }
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
