"""What is wrapped around the single-device model code, from outside and in a fixed order.

The model knows nothing of it. Activation checkpointing comes first; compilation and sharding wrap
what it has wrapped.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from open_mythos.context import Context
from open_mythos.model import OpenMythos
from open_mythos.trace import LoopTrace


def apply_activation_checkpointing(model: OpenMythos) -> None:
    """Keep only the state between loops for the backward pass, and recompute each loop there.

    Replaces ``model.recurrent.step``, the one place through which every loop goes. Calling it twice
    changes nothing.
    """
    block: Any = model.recurrent
    if "step" in vars(block):
        return
    plain = block.step

    def step(
        h_BTD: Tensor, drive_BTD: Tensor, t: int, ctx: Context, trace: LoopTrace | None = None
    ) -> Tensor:
        # all randomness is a function of the sequence's key, so there is no RNG state to restore
        return checkpoint(
            plain, h_BTD, drive_BTD, t, ctx, trace, use_reentrant=False, preserve_rng_state=False
        )

    block.step = step
