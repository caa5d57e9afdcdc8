"""Injection variants of one small model.

All but one are configuration fields. The predecessor of this library applied the block, including
its residual, to the normalized sum of state and input, and added the result to A h + B e.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from experiments.training import seeded
from open_mythos.config import MythosConfig
from open_mythos.model.context import Context
from open_mythos.model.init import init_weights
from open_mythos.model.layers.injection import LTIInjection
from open_mythos.model.layers.norm import RMSNorm
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.recurrent import RecurrentBlock
from open_mythos.model.trace import LoopTrace

PREDECESSOR = "predecessor"
RULES: dict[str, dict[str, Any]] = {
    "additive": {"injection": "add"},
    "concat": {"injection": "concat"},
    "sandwich": {"injection": "concat", "block_norms": "in+sum"},
    "stable": {},
    PREDECESSOR: {},
}
"""Rule -> configuration fields."""


class _InputKept(LTIInjection):
    """Pass e through, because the predecessor's loop uses it twice."""

    def drive(self, e_BTD: Tensor) -> Tensor:
        """Return e."""
        return e_BTD


class PredecessorLoop(RecurrentBlock):
    """Compute h <- A h + B e + Block(norm(h + e)) with one block."""

    def __init__(self, cfg: MythosConfig, first_layer: int) -> None:
        super().__init__(cfg, first_layer)
        self.injection = _InputKept(cfg.dim, cfg.injection_rule, cfg.injection_matrix)
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)

    def step(
        self,
        h_BTD: Tensor,
        drive_BTD: Tensor,
        t: int | Tensor,
        ctx: Context,
        trace: LoopTrace | None = None,
    ) -> Tensor:
        """Run one iteration; ``drive_BTD`` is e."""
        injection = self.injection
        assert isinstance(injection, LTIInjection)
        linear_BTD = injection.hold(h_BTD) + LTIInjection.drive(injection, drive_BTD)
        x_BTD = linear_BTD + self.blocks[0](self.norm(h_BTD + drive_BTD), ctx, t)
        if trace is not None:
            trace.record_state(t, h_BTD, x_BTD, ctx.active)
        return x_BTD


def build_arm(rule: str, model: dict[str, Any], seed: int) -> OpenMythos:
    """Build a model with injection ``rule`` (a key of RULES) and configuration ``model``."""
    cfg = MythosConfig.from_dict(model | RULES[rule])
    with seeded(seed):
        lm = OpenMythos(cfg)
        if rule == PREDECESSOR:
            lm.recurrent = PredecessorLoop(cfg, cfg.prelude_layers)
            init_weights(lm.recurrent, cfg.dim)
    return lm
