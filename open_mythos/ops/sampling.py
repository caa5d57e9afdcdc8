"""From logits to the next token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from open_mythos.checks import is_number, whole
from open_mythos.errors import ConfigError
from open_mythos.ops.random import counter_uniform
from open_mythos.seeding import derive_seed

COLDEST = 1e-4
"""Lowest temperature above 0; logits divided by less would lose their differences to rounding."""


@dataclass(frozen=True)
class SamplingParams:
    """How a prompt is continued: how each token is chosen, and what ends a row.

    The filters apply in the order repetition penalty, temperature, top-k, top-p, min-p.

    Raises:
        ConfigError: A value is out of range.
    """

    max_new_tokens: int = 64
    """Tokens to add at most."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int | None = 50
    """Draw from the k most likely tokens; 0 or None: from all."""
    top_p: float = 1.0
    """Draw from the smallest set with this much probability."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that have occurred less likely, prompt included."""
    seed: int | Sequence[int] | None = None
    """One integer (rows draw independent streams of it) or one per row; None takes one from
    torch's global generator."""
    eos_token_id: int | None = None
    """Ends a row; the rest of the row is filled with it."""
    stop: str | Sequence[str] = ()
    """Strings that end a row as soon as its new text contains one."""

    def __post_init__(self) -> None:
        rules: tuple[tuple[str, Callable[[float], bool], str], ...] = (
            ("temperature", lambda x: x == 0 or x >= COLDEST, f"0 (greedy), or >= {COLDEST}"),
            ("top_p", lambda x: 0 < x <= 1, "0 < top_p <= 1"),
            ("min_p", lambda x: 0 <= x <= 1, "0 <= min_p <= 1"),
            ("repetition_penalty", lambda x: x > 0, "a finite number > 0"),
        )
        for name, holds, allowed in rules:
            value = getattr(self, name)
            if not is_number(value) or not holds(value):
                _reject(name, value, allowed)
        if self.top_k is not None and (whole(self.top_k) is None or self.top_k < 0):
            _reject("top_k", self.top_k, "an integer >= 0, or None")
        if (whole(self.max_new_tokens) or 0) < 0 or whole(self.max_new_tokens) is None:
            _reject("max_new_tokens", self.max_new_tokens, "an integer >= 0")
        end = self.eos_token_id
        if end is not None and (whole(end) is None or end < 0):
            _reject("eos_token_id", end, "None, or an integer >= 0; give several ends as stop")
        one = isinstance(self.stop, str) or not isinstance(self.stop, Sequence)
        stops: Any = (self.stop,) if one else tuple(self.stop)
        if not all(isinstance(text, str) and text for text in stops):
            _reject("stop", self.stop, "strings of at least one character")
        object.__setattr__(self, "stop", stops)
        seeds = self.seed if isinstance(self.seed, Sequence) else (self.seed,)
        if self.seed is not None and any(whole(seed) is None for seed in seeds):
            _reject("seed", self.seed, "None, an integer, or one integer per row")
        if isinstance(self.seed, Sequence):
            object.__setattr__(self, "seed", tuple(self.seed))

    @property
    def of_a_step(self) -> SamplingParams:
        """What a decoding step depends on: the same without length, seed and stop strings."""
        return replace(self, max_new_tokens=0, seed=None, stop=())

    def row_keys(self, batch: int) -> Tensor:
        """Return (B,) int64 keys: streams of one seed, or each row's own seed."""
        if self.seed is None:
            return torch.randint(1 << 62, (batch,))
        if isinstance(self.seed, Sequence):
            self.check_rows(batch)
            return torch.tensor([derive_seed(int(seed), "sample", 0) for seed in self.seed])
        seed = int(self.seed)
        return torch.tensor([derive_seed(seed, "sample", row) for row in range(batch)])

    def check_rows(self, batch: int) -> None:
        """Check that the seeds fit a batch.

        Raises:
            ConfigError: There are several of them, and not one per row.
        """
        if isinstance(self.seed, Sequence) and len(self.seed) != batch:
            _reject("seed", self.seed, f"None, an integer, or {batch} integers (one per row)")

    def choose(
        self, logits_BV: Tensor, seen_BT: Tensor, keys_B: Tensor, position: int | Tensor
    ) -> Tensor:
        """Choose the next token of every row, (B,).

        Args:
            logits_BV: Logits.
            seen_BT: Token ids that have occurred in each row; negative entries are ignored.
            keys_B: One int64 key per row, from which its draws follow.
            position: Number of the draw within the row; (1,) int64 where only the device knows it.
        """
        logits_BV = penalise_repetition(logits_BV.float(), seen_BT, self.repetition_penalty)
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        logits_BV = filter_logits(
            logits_BV / self.temperature, top_k=self.top_k or 0, top_p=self.top_p, min_p=self.min_p
        )
        return sample_tokens(logits_BV, keys_B, position)


def penalise_repetition(logits_BV: Tensor, seen_BT: Tensor, penalty: float) -> Tensor:
    """Make tokens that have occurred less likely (CTRL, arXiv 1909.05858, section 4.1).

    Args:
        logits_BV: Logits.
        seen_BT: Token ids that have occurred in each row; negative entries are ignored.
        penalty: Positive logits are divided by it, negative ones multiplied; 1 changes nothing.
    """
    if penalty == 1.0:
        return logits_BV
    occurs_BT = (seen_BT >= 0).to(logits_BV.dtype)
    seen_BV = torch.zeros_like(logits_BV).scatter_add_(1, seen_BT.clamp_min(0), occurs_BT) > 0
    scaled_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, scaled_BV, logits_BV)


def filter_logits(
    logits_BV: Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Set the logits of tokens that may not be drawn to -inf.

    The filters apply one after the other, each to the distribution that the last one left.

    Args:
        logits_BV: Logits, temperature already applied.
        top_k: Keep the k most likely tokens, and those as likely as the k-th (0: all).
        top_p: Keep the smallest set of tokens whose probability reaches ``top_p``
            (arXiv 1904.09751); at least one.
        min_p: Keep tokens at least ``min_p`` times as likely as the most likely one
            (arXiv 2407.01082).
    """
    if 0 < top_k < logits_BV.shape[-1]:
        kth = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth, -torch.inf)
    if top_p < 1.0:
        ordered, index = logits_BV.sort(dim=-1, descending=True)
        probability = ordered.softmax(-1)
        before = probability.cumsum(-1) - probability
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        logits_BV = torch.empty_like(logits_BV).scatter_(1, index, ordered)
    if min_p > 0.0:
        probability = logits_BV.softmax(-1)
        floor = min_p * probability.max(-1, keepdim=True).values
        logits_BV = logits_BV.masked_fill(probability < floor, -torch.inf)
    return logits_BV


def sample_tokens(logits_BV: Tensor, keys_B: Tensor, position: int | Tensor) -> Tensor:
    """Draw one token per row from softmax(logits), (B,).

    The draw is a function of the row's key and the position alone (the Gumbel-max method over
    counter-based noise), so a row's tokens do not depend on its batch or on the device.
    """
    if isinstance(position, int):
        position = keys_B.new_full((1,), position)  # made on the device: nothing is copied
    uniform = counter_uniform(keys_B, position, logits_BV.shape[-1], salt=0).squeeze(1)
    return (logits_BV - torch.log(-torch.log(uniform))).argmax(-1)


def _reject(name: str, value: Any, allowed: str) -> NoReturn:
    raise ConfigError(
        f"{name} is out of range", where=name, value=value, allowed=allowed,
        fix=f"leave {name} out for its default",
    )  # fmt: skip
