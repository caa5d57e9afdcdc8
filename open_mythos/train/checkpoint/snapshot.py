"""Content of a checkpoint: the tensors and texts that a run resumes from, by file.

checkpoints/step_00000100/
      model.safetensors, config.json    as written by ``save_pretrained``
      optimizer.safetensors             optimizer state, by parameter name
      average.safetensors               averaged weights, with ``optim.ema_decay``
      state.json                        step, tokens, data position, configuration, depths trained
      manifest.json                     size and hashes of every other file; written last

All randomness is derived from the seed and the step, so no generator state is stored. The format
is described in docs/checkpoint_format.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from open_mythos.hub.places import CONFIG_FILE, WEIGHTS_FILE
from open_mythos.hub.pretrained import describe, model_tensors
from open_mythos.run_folder import STATE_FILE
from open_mythos.train.build import Model
from open_mythos.train.checkpoint.manifest import as_json

OPTIMIZER_FILE = "optimizer.safetensors"

Extra = Mapping[str, Mapping[str, Tensor]]
"""Additional safetensors file of a checkpoint -> name -> tensor."""


@dataclass(frozen=True)
class Snapshot:
    """Content of a checkpoint, on the CPU."""

    step: int
    """Optimizer steps done."""
    tensors: Mapping[str, Mapping[str, Tensor]]
    """File -> name -> contiguous tensor; DTensors where the model is sharded."""
    texts: Mapping[str, str]
    """File -> content."""

    @property
    def name(self) -> str:
        """Name of the checkpoint's folder."""
        return f"step_{self.step:08d}"


def take_snapshot(
    step: int,
    model: Model,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    *,
    extra: Extra | None = None,
    copy: bool = False,
) -> Snapshot:
    """Collect the content of a checkpoint; ``state`` is the JSON-ready content of ``state.json``.

    With ``copy``, tensors on the CPU are copied, which takes the checkpoint's size in host memory,
    so that training can continue while the snapshot is written.
    """
    tensors = {
        file: {name: each.to("cpu", copy=copy).contiguous() for name, each in tensors.items()}
        for file, tensors in stored_tensors(model, optimizer, extra).items()
    }
    texts = {CONFIG_FILE: as_json(describe(model)), STATE_FILE: as_json(state)}
    return Snapshot(step, tensors, texts)


def stored_tensors(
    model: Model, optimizer: torch.optim.Optimizer, extra: Extra | None = None
) -> dict[str, Mapping[str, Tensor]]:
    """Return file -> name -> tensor of a checkpoint, on the device, with existing state only."""
    state = {
        f"{name}/{key}": value.detach().contiguous()
        for name, parameter in named_parameters(optimizer)
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    further = {
        file: {name: each.detach() for name, each in tensors.items()}
        for file, tensors in (extra or {}).items()
    }
    return {WEIGHTS_FILE: model_tensors(model), OPTIMIZER_FILE: state, **further}


def named_parameters(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """Return the optimizer's parameters with their names, in its order."""
    pairs = (zip(g["param_names"], g["params"], strict=True) for g in optimizer.param_groups)
    return list(chain.from_iterable(pairs))
