"""Distillation: a frozen teacher whose predictions the loss also matches."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from open_mythos.data.batch import IGNORE_INDEX
from open_mythos.errors import ConfigError
from open_mythos.hub.pretrained import from_pretrained
from open_mythos.model.depth import Depth
from open_mythos.ops.cross_entropy import chunk_rows
from open_mythos.train.build import Model
from open_mythos.train.config import RunConfig

Head = Callable[[Tensor], Tensor]
"""Hidden states (N, D) -> logits (N, V)."""


class Teacher:
    """A model whose predictions are matched; a looped one runs once.

    Every process holds all of it.

    Args:
        model: In evaluation mode.
        weight: Factor on the divergence.
        temperature: Temperature T of both distributions.
    """

    def __init__(self, model: Model, weight: float = 0.5, temperature: float = 2.0) -> None:
        self.model, self.weight, self.temperature = model.requires_grad_(False), weight, temperature

    @classmethod
    def of(cls, config: RunConfig, device: torch.device) -> Teacher | None:
        """Load ``train.teacher``; None if the run has none.

        Raises:
            ConfigError: Its vocabulary is another one.
        """
        train = config.train
        if not train.teacher:
            return None
        model = from_pretrained(train.teacher, device)
        if model.cfg.vocab_size != config.model.vocab_size:
            raise ConfigError(
                "the teacher has another vocabulary", where="train.teacher",
                value=model.cfg.vocab_size, allowed=f"{config.model.vocab_size} ids",
                fix="choose a teacher with the tokenizer of the model",
            )  # fmt: skip
        return cls(model, train.teacher_weight, train.teacher_temperature)

    def loss(
        self, hidden_BTD: Tensor, head: Head, input_ids: Tensor, targets: Tensor,
        document_ids: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the weighted divergence, summed over the positions with a target.

        Args:
            hidden_BTD: The student's final hidden states.
            head: The student's head.
            input_ids: (B, T) token ids.
            targets: (B, T) next tokens; -100 where there is no loss.
            document_ids: (B, T); attention is restricted to the own document.
        """
        with torch.no_grad():
            ctx = self.model.context(input_ids, document_ids=document_ids)
            taught_BTD = self.model.hidden(input_ids, ctx, Depth(1))
        return self.weight * divergence(
            (head, hidden_BTD.flatten(0, 1)), (self.model.head, taught_BTD.flatten(0, 1)),
            (targets != IGNORE_INDEX).flatten(), self.temperature,
        )  # fmt: skip


def divergence(
    student: tuple[Head, Tensor],
    teacher: tuple[Head, Tensor],
    counts_N: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Return T^2 KL(teacher || student) at temperature T, summed over positions, in nats.

    The factor T^2 keeps the size of the gradient (Hinton et al., arXiv 1503.02531). Logits of a
    few positions at a time are in memory; the backward pass recomputes them.

    Args:
        student: Head and hidden states (N, D).
        teacher: The same, without gradient.
        counts_N: False on positions to leave out.
        temperature: T.
    """
    (head, hidden_ND), (other, taught_ND) = student, teacher

    def of_rows(hidden: Tensor, taught: Tensor, counts: Tensor) -> Tensor:
        log_q, log_p = (
            F.log_softmax(logits.float() / temperature, dim=-1)
            for logits in (head(hidden), other(taught))
        )
        apart = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        return temperature**2 * torch.where(counts, apart, 0).sum()

    vocab = head(hidden_ND[:0]).shape[-1]
    rows = chunk_rows(len(hidden_ND), vocab, torch.float32, hidden_ND.device)
    parts = zip(*(x.split(rows) for x in (hidden_ND, taught_ND, counts_N)), strict=True)
    return torch.stack([checkpoint(of_rows, *part, use_reentrant=False) for part in parts]).sum()
