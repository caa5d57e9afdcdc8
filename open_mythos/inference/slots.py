"""State of the engine's slots: one row of each tensor per running sequence.

A slot's row stays where it is while its sequence runs, so that a step of constant shape can be
captured once. The last row is the dummy that pads batches: it never runs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from open_mythos.inference.request import MOST_ENDS, Request
from open_mythos.ops.sampling import RowSampling, Stages

FREE, LOOPING, WAITING = 0, 1, 2
"""Phases of a slot: not computed, between loops, or ready for coda and head."""
SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty",
)  # fmt: skip
"""Sampling parameters of a row, in the order of :class:`RowSampling`."""


@dataclass
class Slots:
    """Tensors of B slots and the dummy; int64 (B + 1,) where nothing else is said."""

    phase: Tensor
    h: Tensor
    """(B, 1, D) state."""
    drive: Tensor
    """(B, 1, D) B e, float32."""
    t: Tensor
    """Loops that the current token has run."""
    most: Tensor
    """Most loops of a token."""
    least: Tensor
    """Fewest loops of a token."""
    position: Tensor
    """Position of the current token."""
    token: Tensor
    """The current token."""
    draw: Tensor
    """Number of earlier draws."""
    max_tokens: Tensor
    """New tokens that end the request."""
    key: Tensor
    """Random key of the draws."""
    ends: Tensor
    """(B, 4) EOS ids; -1 fills up."""
    ids: Tensor
    """(B, S) tokens by position; -1 after the current one."""
    n_prompt: Tensor
    """Tokens of the prompt."""
    rule: Tensor
    """Index of the exit rule; 0 for none."""
    numbers: Tensor
    """(B, 2) parameters of the exit rule, float32."""
    temperature: Tensor
    """float32, as the following ones but top_k."""
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    presence_penalty: Tensor
    frequency_penalty: Tensor

    @classmethod
    def empty(
        cls, n_slots: int, context: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> Slots:
        """Allocate ``n_slots`` free slots and the dummy."""
        n = n_slots + 1
        shapes = {
            "h": torch.zeros(n, 1, dim, dtype=dtype, device=device),
            "drive": torch.zeros(n, 1, dim, device=device),
            "ends": torch.full((n, MOST_ENDS), -1, device=device),
            "ids": torch.full((n, context), -1, device=device),
            "numbers": torch.zeros(n, 2, device=device),
            **{name: torch.zeros(n, device=device) for name in SAMPLING},
            "top_k": torch.zeros(n, dtype=torch.long, device=device),
        }
        whole = {f.name: torch.zeros(n, dtype=torch.long, device=device) for f in fields(cls)}
        return cls(**{**whole, **shapes})

    def tensors(self) -> list[Tensor]:
        """Return all tensors."""
        return [getattr(self, each.name) for each in fields(self)]

    def place(self, slot: int, request: Request, rule: int) -> None:
        """Set a slot's request; the slot stays FREE until its prompt has run.

        Args:
            slot: The slot.
            request: Its request.
            rule: Index of the request's exit rule.
        """
        n_prompt = len(request.prompt)
        self.ids[slot, n_prompt:] = -1
        self.ids[slot, :n_prompt] = torch.tensor(request.prompt, device=self.ids.device)
        self.ends[slot] = torch.tensor([*request.ends, *[-1] * (MOST_ENDS - len(request.ends))])
        self.numbers[slot] = torch.tensor([*request.numbers, 0.0, 0.0][:2])
        values = {
            "phase": FREE, "t": 0, "most": request.max_loops, "least": request.min_loops,
            "position": n_prompt - 1, "n_prompt": n_prompt, "max_tokens": request.max_tokens,
            "draw": 0, "key": request.key, "rule": rule,
            **{name: getattr(request, name) for name in SAMPLING},
        }  # fmt: skip
        for name, value in values.items():
            getattr(self, name)[slot] = value

    def sampling(self, slots_R: Tensor, stages: Stages) -> RowSampling:
        """Return the sampling values of rows."""
        columns = (getattr(self, name)[slots_R] for name in SAMPLING)
        return RowSampling(*columns, stages=stages)
