"""The output head."""

from __future__ import annotations

from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.ops.cross_entropy import cap_logits


class OutputHead(nn.Linear):
    """Output head cap(scale * W h), with cap(x) = c tanh(x / c) if ``logit_softcap`` is c > 0."""

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__(cfg.dim, cfg.vocab_size, bias=False)
        self.scale, self.softcap = cfg.logit_scale, cfg.logit_softcap

    def forward(self, h: Tensor) -> Tensor:
        """Map (..., D) states to (..., V) logits."""
        h = h if self.scale == 1 else h * self.scale
        return cap_logits(super().forward(h), self.softcap)
