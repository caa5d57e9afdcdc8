"""The dynamic loss scale that float16 needs: small gradients would round to zero in it.

The rule of ``torch.amp.GradScaler`` (arXiv 1710.03740, section 3.2). Its own class decides on each
process alone whether to skip a step; here that decision is the one that all processes take.
"""

from __future__ import annotations

from dataclasses import dataclass

GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000


@dataclass
class LossScale:
    """The factor by which the loss is multiplied before it is back-propagated."""

    scale: float = 65536.0
    """The factor; 1 and constant for dtypes with the range of float32."""
    good_steps: int = 0
    """Steps since it last changed."""
    dynamic: bool = True
    """Whether it changes."""

    @classmethod
    def off(cls) -> LossScale:
        """For dtypes with the range of float32."""
        return cls(1.0, dynamic=False)

    def update(self, overflowed: bool) -> bool:
        """Halve it after an overflow, double it after many good steps; whether it could give way.

        An overflow that halving may cure says nothing about the run.
        """
        if not self.dynamic:
            return False
        if overflowed:
            gave_way = self.scale > 1.0
            self.scale, self.good_steps = max(1.0, self.scale * BACKOFF), 0
            return gave_way
        self.good_steps += 1
        if self.good_steps == INTERVAL:
            self.scale, self.good_steps = self.scale * GROWTH, 0
        return False
