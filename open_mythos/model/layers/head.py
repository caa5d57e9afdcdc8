"""The output head: logits of hidden states, and their loss."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.ops.cross_entropy import (
    cap_logits,
    chunked_cross_entropy,
    linear_cross_entropy,
)


class OutputHead(nn.Linear):
    """Output head cap(scale * W h), with cap(x) = c tanh(x / c) if ``logit_softcap`` is c > 0."""

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__(cfg.dim, cfg.vocab_size, bias=False)
        self.scale, self.softcap = cfg.logit_scale, cfg.logit_softcap

    def forward(self, h: Tensor) -> Tensor:
        """Map (..., D) states to (..., V) logits."""
        return head_logits(super().forward, h, self.scale, self.softcap)


def head_logits(
    head: Callable[[Tensor], Tensor], h: Tensor, scale: float, softcap: float
) -> Tensor:
    """Return the logits (..., V) of states (..., D): cap(head(scale * h)).

    Args:
        head: A linear map, possibly with an adapter.
        h: States.
        scale: ``logit_scale`` of the configuration.
        softcap: ``logit_softcap`` of the configuration.
    """
    return cap_logits(head(h if scale == 1 else h * scale), softcap)


def head_loss(
    head: Callable[[Tensor], Tensor], hidden_BTD: Tensor, targets_BT: Tensor, ignore_index: int
) -> Tensor:
    """Sum the cross-entropy of the targets in nats, without the logits of a whole batch.

    Args:
        head: The head of a model. Modules around it, such as adapters, are called.
        hidden_BTD: Final hidden states.
        targets_BT: int64 class of each position.
        ignore_index: Target of positions to ignore.
    """
    if not isinstance(head, OutputHead):
        return chunked_cross_entropy(head, hidden_BTD, targets_BT, ignore_index=ignore_index)
    return linear_cross_entropy(
        hidden_BTD, head.weight, targets_BT, ignore_index=ignore_index, reduction="sum",
        scale=head.scale, softcap=head.softcap,
    )  # fmt: skip
