"""Optimizer and weight decay of each parameter, from one table: :data:`RULES`.

"adamw" is AdamW for everything; "muon" is Muon for the matrices inside the blocks and AdamW for the
rest (:mod:`open_mythos.train.optimizers.muon`), with the same weight decay and, unless
``optim.adamw_lr`` is set, the same learning rate.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from open_mythos.checks import check_number, checked, pick
from open_mythos.errors import ConfigError
from open_mythos.train.config import OptimConfig
from open_mythos.train.optimizers.muon import Muon, MuonAdamW


@dataclass(frozen=True)
class Rule:
    """Treatment of the parameters whose names contain ``pattern``, a regular expression."""

    pattern: str
    what: str
    """Description of these parameters."""
    decayed: bool
    """Whether weight decay applies."""
    maps: int
    """Maps of equal size that share a matrix; 0 if Muon does not apply."""
    why: str


_ADAMW_KEEPS = frozenset({"step", "exp_avg", "exp_avg_sq"})
_MUON_KEEPS = frozenset({"momentum_buffer"})
NOT_TRAINED = re.compile(r"halting\.")
"""The halting gate, which is trained later on the frozen model."""

RULES = (
    Rule(
        r"norm\.|bias$", "norms and biases", False, 0,
        "no matrices; a norm's rest position is one, not zero",
    ),
    Rule(
        r"injection\.|readout\.", "injection (log_A, dt_bias, B) and read-out C", False, 0,
        "their rest position is not zero but the start of a stable recurrence; Muon, whose updates "
        "are as large in every direction, would leave it fast",
    ),
    Rule(
        r"embeddings?\.", "embedding, and the head if tied to it", False, 0,
        "a table of rows; those of rare tokens would shrink at every step without the token",
    ),
    Rule(
        r"head\.|router\.", "head and router", True, 0,
        "their outputs are read one by one, as scores of tokens and of experts",
    ),
    Rule(
        r"lora\.", "adapters of the loops", True, 0,
        "few samples reach the deep loops; Muon would let those move as far as the first ones",
    ),
    Rule(
        r"kv_proj\.weight$", "keys and values of grouped-query attention", True, 2,
        "two maps in one matrix",
    ),
    Rule(
        r"(q_proj|out_proj|(q|kv)_(down|up))\.weight$",
        "queries and output of attention; down- and up-projections of latent attention", True, 1,
        "hidden matrices",
    ),
    Rule(
        r"gate_up(\.weight)?$", "gate and up of feed-forwards and of every expert", True, 2,
        "two maps in one matrix",
    ),
    Rule(
        r"(up|down)(\.weight)?$", "up and down of feed-forwards, down of every expert", True, 1,
        "hidden matrices",
    ),
    Rule(r"", "any other matrix", True, 0, "not known to be a hidden map"),
)  # fmt: skip
"""The first match counts; vectors are never decayed or given to Muon."""


def rule_of(name: str) -> Rule:
    """Return the rule of a matrix or a stack of matrices."""
    return next(rule for rule in RULES if re.search(rule.pattern, name))


@checked
def parameter_groups(
    model: nn.Module, weight_decay: float, name: str = "adamw"
) -> list[dict[str, Any]]:
    """Return groups of named parameters, in the order of the model, without the halting gate.

    Args:
        model: Its parameters are classified by their names in this library's layers.
        weight_decay: Weight decay of all groups but "no_decay".
        name: "adamw": groups "decay" and "no_decay". "muon": first "muon" and "muon_pairs" (two
            maps per matrix), with the key ``side_by_side``. Empty groups are omitted.

    Raises:
        ConfigError: There is no such optimizer.
    """
    pick(OPTIMIZERS, name, "optim.name", what="optimizer")
    check_number("weight_decay", weight_decay, ge=0)
    groups: dict[str, dict[str, Any]] = {
        "muon": {"weight_decay": weight_decay, "side_by_side": 1},
        "muon_pairs": {"weight_decay": weight_decay, "side_by_side": 2},
        "decay": {"weight_decay": weight_decay},
        "no_decay": {"weight_decay": 0.0},
    }
    for each, parameter in model.named_parameters():
        if NOT_TRAINED.search(each):
            continue
        rule = rule_of(each)
        group = "decay" if rule.decayed and parameter.dim() > 1 else "no_decay"
        if name == "muon" and rule.maps and parameter.dim() > 1:
            group = "muon" if rule.maps == 1 else "muon_pairs"
        groups[group].setdefault("params", []).append((each, parameter))
    return [{"name": group} | options for group, options in groups.items() if "params" in options]


@checked
def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer of the configuration over :func:`parameter_groups`.

    Its groups hold ``param_names``, and ``lr_factor``, their share of the learning rate. Shard a
    model first: that replaces its parameters.

    Raises:
        ConfigError: There is no such optimizer.
    """
    groups = parameter_groups(model, config.weight_decay, config.name)
    for group in groups:
        is_split = config.adamw_lr and "side_by_side" not in group
        group["lr_factor"] = config.adamw_lr / config.lr if is_split else 1.0
    return OPTIMIZERS[config.name](groups, config)


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW, fused if the device supports it."""
    parameters = [parameter for group in groups for _, parameter in group["params"]]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused
    )


def _muon(groups: list[dict[str, Any]], config: OptimConfig) -> MuonAdamW:
    """Build Muon for the groups with ``side_by_side``, AdamW for the others."""
    hidden = [group for group in groups if "side_by_side" in group]
    if not hidden:
        raise ConfigError(
            "the model has no matrices that Muon knows", where="optim.name", value=config.name,
            allowed="a model of this library's layers", fix='set optim.name to "adamw"',
        )  # fmt: skip
    muon = Muon(
        hidden, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov,
        ns_steps=config.ns_steps,
    )  # fmt: skip
    return MuonAdamW(muon, _adamw([g for g in groups if "side_by_side" not in g], config))


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "muon": _muon,
}
"""Name -> ``build(groups, config)``."""


def state_names(optimizer: torch.optim.Optimizer) -> dict[str, frozenset[str]]:
    """Return parameter -> keys of its optimizer state, as checkpoints name them."""
    return {
        name: _MUON_KEEPS if "ns_steps" in group else _ADAMW_KEEPS
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


def freeze_halting_gate(model: nn.Module) -> None:
    """Set ``requires_grad`` of the halting gate to False."""
    for name, parameter in model.named_parameters():
        if NOT_TRAINED.search(name):
            parameter.requires_grad_(False)
