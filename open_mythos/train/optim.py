"""AdamW, and which parameters its weight decay reaches.

Decayed are the matrices of attention, feed-forwards, experts, router, adapters and head. Not
decayed are norms and biases; the injection (log_A, dt_bias, B) and the read-out C, whose rest
position is not zero but the start of a stable recurrence; and the embedding, whose rows for rare
tokens would shrink at every step that does not contain them (a tied head shares that choice). The
halting gate is in no group: it is trained later, on the frozen model.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from open_mythos.train.config import OptimConfig

NO_DECAY = re.compile(r"injection\.|readout\.|embedding\.|norm\.|bias$")
NOT_TRAINED = re.compile(r"halting\.")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of named parameters, "decay" and "no_decay", in the order of the model."""
    decay: list[tuple[str, nn.Parameter]] = []
    no_decay: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        if NOT_TRAINED.search(name):
            continue
        exempt = parameter.dim() < 2 or NO_DECAY.search(name)
        (no_decay if exempt else decay).append((name, parameter))
    return [
        {"name": "decay", "params": decay, "weight_decay": weight_decay},
        {"name": "no_decay", "params": no_decay, "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`, in one fused kernel where the device has it."""
    parameters = list(model.parameters())
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused,
    )  # fmt: skip


def freeze_halting_gate(model: nn.Module) -> None:
    """Take the halting gate out of the graph: no loss here reaches it."""
    for name, parameter in model.named_parameters():
        if NOT_TRAINED.search(name):
            parameter.requires_grad_(False)
