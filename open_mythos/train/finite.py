"""Whether the state of a run is finite: only such a state is saved, and only such is resumed."""

from __future__ import annotations

import torch

from open_mythos.distributed import over_ranks
from open_mythos.errors import MythosError
from open_mythos.train.build import Model
from open_mythos.train.checkpoint.snapshot import Extra, stored_tensors
from open_mythos.train.optimizers.muon import local


class DivergedError(MythosError):
    """The loss spiked, or loss or weights are not finite, and rolling back did not help."""


def spoilt(model: Model, optimizer: torch.optim.Optimizer, extra: Extra | None = None) -> str:
    """Return why the state must not be saved, "" if all of it is finite; equal in all processes.

    A collective call. A step whose update overflows has a finite loss and gradient: it is found
    here, before its weights replace those of a checkpoint.
    """
    named = {
        f"{name} in {file}": local(tensor)
        for file, tensors in stored_tensors(model, optimizer, extra).items()
        for name, tensor in tensors.items()
    }
    bad = over_ranks([float(not torch.isfinite(each).all()) for each in named.values()])
    names = [name for name, flags in zip(named, bad, strict=True) if any(flags)]
    if not names:
        return ""
    return f"{len(names)} tensors are not finite: {', '.join(names[:3])}"
