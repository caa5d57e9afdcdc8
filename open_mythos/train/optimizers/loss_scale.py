"""Dynamic loss scaling for float16, in which small gradients would round to zero.

The rule of ``torch.amp.GradScaler`` (arXiv 1710.03740, section 3.2), but all processes decide
together whether to skip a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

START, GROWTH, BACKOFF, INTERVAL = 65536.0, 2.0, 0.5, 2000


class LossScale:
    """The factor by which the loss is multiplied before the backward pass, on the device.

    It is 1 unless ``dynamic``, which only float16 needs.
    """

    def __init__(self, device: torch.device, dynamic: bool) -> None:
        self.dynamic = dynamic
        self.scale = torch.full((), START if dynamic else 1.0, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def apply(self, loss: Tensor) -> Tensor:
        """Multiply by the scale."""
        return loss * self.scale if self.dynamic else loss

    def unscale(self, x: Tensor) -> Tensor:
        """Divide by the scale."""
        return x / self.scale if self.dynamic else x

    def update(self, proceed: Tensor) -> Tensor:
        """Halve the scale after an overflow, double it after :data:`INTERVAL` good steps.

        ``proceed`` is a boolean scalar, False if loss or gradient was not finite. Returns a boolean
        scalar: whether it was False and the scale could be lowered.
        """
        if not self.dynamic:
            return torch.zeros_like(proceed)
        lowered = ~proceed & (self.scale > 1)
        torch._amp_update_scale_(
            self.scale, self.good_steps, (~proceed).float(), GROWTH, BACKOFF, INTERVAL
        )
        self.scale.clamp_(min=1)
        return lowered

    def state_dict(self) -> dict[str, Any]:
        """Return the state, JSON-ready; reads it from the device."""
        return {
            "scale": self.scale.item(),
            "good_steps": int(self.good_steps.item()),
            "dynamic": self.dynamic,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.dynamic = state["dynamic"]
        self.scale.fill_(state["scale"])
        self.good_steps.fill_(state["good_steps"])
