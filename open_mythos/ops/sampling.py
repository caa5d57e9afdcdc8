"""Sampling of the next token from logits."""

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
"""Lowest temperature above 0, below which logit differences would be lost to rounding."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters and stop criteria of generation.

    Filters apply in the order repetition penalty, temperature, top-k, top-p, min-p.

    Raises:
        ConfigError: A value is out of range.
    """

    max_new_tokens: int = 64
    """Maximum number of new tokens."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int | None = 50
    """Sample from the k most likely tokens; 0 or None disables it."""
    top_p: float = 1.0
    """Sample from the smallest set with this total probability."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the most likely one."""
    repetition_penalty: float = 1.0
    """Values above 1 penalize tokens that have occurred, prompt included."""
    seed: int | Sequence[int] | None = None
    """One integer, from which rows derive independent streams, or one per row; None draws from
    torch's global generator."""
    eos_token_id: int | None = None
    """Ends a row, which is then filled with it."""
    stop: str | Sequence[str] = ()
    """Strings that end a row as soon as they occur in its new text."""

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
            _reject("eos_token_id", end, "None, or an integer >= 0; use stop for several")
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
        """The parameters of a single step: without length, seed and stop strings."""
        return replace(self, max_new_tokens=0, seed=None, stop=())

    def row_keys(self, batch: int) -> Tensor:
        """Return the int64 random keys (B,) of the rows."""
        if self.seed is None:
            return torch.randint(1 << 62, (batch,))
        if isinstance(self.seed, Sequence):
            self.check_rows(batch)
            return torch.tensor([derive_seed(int(seed), "sample", 0) for seed in self.seed])
        return torch.tensor([derive_seed(int(self.seed), "sample", row) for row in range(batch)])

    def check_rows(self, batch: int) -> None:
        """Check that ``seed`` is not a sequence of another length than ``batch``.

        Raises:
            ConfigError: It is.
        """
        if isinstance(self.seed, Sequence) and len(self.seed) != batch:
            _reject("seed", self.seed, f"None, an integer, or {batch} integers (one per row)")

    def choose(
        self, logits_BV: Tensor, seen_BT: Tensor, keys_B: Tensor, position: int | Tensor
    ) -> Tensor:
        """Sample the next token of every row, (B,).

        Negative entries of ``seen_BT``, the tokens that have occurred, are ignored. ``position``
        counts the draws of a row; as a (1,) int64 tensor it needs no host-device sync.
        """
        logits_BV = penalize_repetition(logits_BV.float(), seen_BT, self.repetition_penalty)
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        logits_BV = filter_logits(
            logits_BV / self.temperature, top_k=self.top_k or 0, top_p=self.top_p, min_p=self.min_p
        )
        return sample_tokens(logits_BV, keys_B, position)


def penalize_repetition(logits_BV: Tensor, seen_BT: Tensor, penalty: float) -> Tensor:
    """Penalize tokens that have occurred (CTRL, arXiv 1909.05858, section 4.1).

    Positive logits are divided by ``penalty``, negative ones multiplied; 1 changes nothing.
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
    """Mask excluded tokens with -inf.

    Each filter applies to the distribution that the previous one left.

    Args:
        logits_BV: Logits, temperature already applied.
        top_k: Keep the k most likely tokens, including ties with the k-th (0: all).
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
    """Sample one token per row from softmax(logits), (B,).

    Gumbel-max sampling with counter-based noise of key and position, so that a row's tokens do not
    depend on its batch or on the device.
    """
    if isinstance(position, int):
        position = keys_B.new_full((1,), position)  # created on the device, without a copy
    uniform = counter_uniform(keys_B, position, logits_BV.shape[-1], salt=0).squeeze(1)
    return (logits_BV - torch.log(-torch.log(uniform))).argmax(-1)


def _reject(name: str, value: Any, allowed: str) -> NoReturn:
    raise ConfigError(
        f"{name} is out of range", where=name, value=value, allowed=allowed,
        fix=f"omit {name} to use its default",
    )  # fmt: skip
