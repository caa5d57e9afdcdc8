"""Sampling of the next token from logits.

There is one implementation, :class:`RowSampling`: every row has values of its own. A row's token
does not depend, in any bit, on the values or logits of other rows, so a batch of different requests
gives each the tokens that it gets alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn, Protocol, cast

import torch
from torch import Tensor

from open_mythos.checks import COLDEST, check_count, is_id, is_number, plain, whole
from open_mythos.errors import ConfigError
from open_mythos.ops.finite import check_logits
from open_mythos.ops.random import counter_uniform
from open_mythos.seeding import derive_seed


class SamplingValues(Protocol):
    """The values of one row, however they are stored."""

    @property
    def temperature(self) -> float:
        """Divides the logits; 0 is greedy."""

    @property
    def top_k(self) -> int | None:
        """Sample from the k most likely tokens; 0 or None disables it."""

    @property
    def top_p(self) -> float:
        """Sample from the smallest set with this total probability."""

    @property
    def min_p(self) -> float:
        """Drop tokens less likely than this fraction of the most likely one."""

    @property
    def repetition_penalty(self) -> float:
        """Values above 1 penalize tokens that have occurred, prompt included."""

    @property
    def presence_penalty(self) -> float:
        """Subtracted from the logits of tokens that have been generated."""

    @property
    def frequency_penalty(self) -> float:
        """Subtracted from the logits of tokens, times how often they have been generated."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters and stop criteria of generation.

    They apply in the order repetition penalty, presence and frequency penalty, logit bias,
    temperature, top-k, top-p, min-p.

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
    eos_token_id: int | Sequence[int] | None = None
    """The token, or each of several, that ends a row; see ``pad_token_id``."""
    stop: str | Sequence[str] = ()
    """Strings that end a row as soon as they occur in its new text."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that have been generated, prompt excluded."""
    frequency_penalty: float = 0.0
    """The same, times how often they have been generated."""
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()
    """Token id -> value added to its logit; stored as pairs."""
    pad_token_id: int | None = None
    """Fills a row that has ended; by default the first of ``eos_token_id``, without one the pad
    token of the tokenizer that decodes stop strings, without that 0."""

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, plain(getattr(self, each.name)))
        rules: tuple[tuple[str, Callable[[float], bool], str], ...] = (
            ("temperature", lambda x: x == 0 or x >= COLDEST, f"0 (greedy), or >= {COLDEST}"),
            ("top_p", lambda x: 0 < x <= 1, "0 < top_p <= 1"),
            ("min_p", lambda x: 0 <= x <= 1, "0 <= min_p <= 1"),
            ("repetition_penalty", lambda x: x > 0, "a finite number > 0"),
            ("presence_penalty", lambda x: True, "a finite number"),
            ("frequency_penalty", lambda x: True, "a finite number"),
        )
        for name, holds, allowed in rules:
            value = getattr(self, name)
            if not is_number(value) or not holds(value):
                _reject(name, value, allowed)
        if self.top_k is not None:
            check_count("top_k", self.top_k, least=0)
        check_count("max_new_tokens", self.max_new_tokens, least=0)
        if isinstance(self.eos_token_id, list | tuple):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        if not all(is_id(end) for end in self.ends):
            _reject("eos_token_id", self.eos_token_id, "None, or one or more integers >= 0")
        pad = self.pad_token_id
        if pad is not None and not is_id(pad):
            _reject("pad_token_id", pad, "None, or an integer >= 0")
        one = isinstance(self.stop, str) or not isinstance(self.stop, Sequence)
        stops: Any = (self.stop,) if one else tuple(self.stop)
        if not all(isinstance(text, str) and text for text in stops):
            _reject("stop", self.stop, "strings of at least one character")
        object.__setattr__(self, "stop", stops)
        several = isinstance(self.seed, Sequence) and not isinstance(self.seed, str | bytes)
        seeds: Any = self.seed if several else (self.seed,)
        if self.seed is not None and any(whole(seed) is None for seed in seeds):
            _reject("seed", self.seed, "None, an integer, or one integer per row")
        if several:
            object.__setattr__(self, "seed", tuple(seeds))
        object.__setattr__(self, "logit_bias", self._pairs())

    def _pairs(self) -> tuple[tuple[int, float], ...]:
        given: Any = self.logit_bias
        try:
            if isinstance(given, str | bytes):
                raise TypeError
            pairs = [
                (whole(i), x) for i, x in (given.items() if hasattr(given, "items") else given)
            ]
        except (TypeError, ValueError):
            pairs = [(None, 0.0)]
        if not all(is_id(i) and is_number(x) for i, x in pairs):
            _reject("logit_bias", given, "token id (an integer >= 0) -> finite number")
        return tuple((i, float(x)) for i, x in pairs if i is not None)

    @property
    def ends(self) -> tuple[int, ...]:
        """``eos_token_id`` as a tuple."""
        end = self.eos_token_id
        return end if isinstance(end, tuple) else () if end is None else (cast("int", end),)

    @property
    def filler(self) -> int:
        """Token of rows that have ended."""
        return next((x for x in (self.pad_token_id, *self.ends) if x is not None), 0)

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """``logit_bias`` as pairs."""
        return cast("tuple[tuple[int, float], ...]", self.logit_bias)

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

    def rows(self, batch: int, device: torch.device | str = "cpu") -> RowSampling:
        """Return the values for ``batch`` equal rows, without a copy to the device."""
        columns = (torch.full((batch,), x, device=device) for x in _row_of(self))
        return RowSampling(*columns, stages=Stages.of([self]))

    def bias(self, n_tokens: int, device: torch.device | str = "cpu") -> Tensor | None:
        """Return ``logit_bias`` as (1, V) float32, or None if it is empty; without a copy."""
        if not self.logit_bias:
            return None
        bias_1V = torch.zeros(1, n_tokens, device=device)
        for i, value in self.biases:
            bias_1V[:, i] = value
        return bias_1V

    def choose(
        self,
        logits_BV: Tensor,
        seen_BT: Tensor,
        keys_B: Tensor,
        draws: int | Tensor,
        n_prompt: int | Tensor = 0,
    ) -> Tensor:
        """Choose the next token of every row, (B,); see :meth:`RowSampling.choose`."""
        check_logits(logits_BV)
        rows = self.rows(len(logits_BV), logits_BV.device)
        bias_1V = self.bias(logits_BV.shape[1], logits_BV.device)
        return rows.choose(logits_BV, seen_BT, n_prompt, keys_B, draws, bias_1V)


@dataclass(frozen=True)
class Stages:
    """What any row of a batch asks for, known to the host: the rest is skipped without a sync.

    Stages that no row needs may be set: they change no row.
    """

    greedy: bool = True
    """Some row has temperature 0."""
    sampled: bool = True
    """Some row has another one."""
    repetition: bool = True
    """Some row has a repetition penalty."""
    generated: bool = True
    """Some row has a presence or frequency penalty."""
    most_k: int = 0
    """At least the largest top-k of any row; 0 if none has one."""
    top_p: bool = True
    """Some row has top-p below 1."""
    min_p: bool = True
    """Some row has min-p above 0."""

    @property
    def plain(self) -> bool:
        """Whether every row takes its most likely token."""
        return not (self.sampled or self.repetition or self.generated)

    @classmethod
    def of(cls, rows: Iterable[SamplingValues]) -> Stages:
        """Return the stages of a batch of these rows."""
        rows = list(rows)
        sampled = [row for row in rows if row.temperature != 0]
        return cls(
            greedy=len(sampled) < len(rows),
            sampled=bool(sampled),
            repetition=any(row.repetition_penalty != 1 for row in rows),
            generated=any(row.presence_penalty or row.frequency_penalty for row in rows),
            most_k=max([0, *(row.top_k or 0 for row in sampled)]),
            top_p=any(row.top_p < 1 for row in sampled),
            min_p=any(row.min_p > 0 for row in sampled),
        )


@dataclass(frozen=True)
class RowSampling:
    """Sampling values of every row, as tensors (B,), float32 but for ``top_k_B``.

    No operation needs a host-device sync, and shapes depend on ``stages`` alone. Rows that do not
    ask for a stage pass it unchanged.
    """

    temperature_B: Tensor
    """0 is greedy."""
    top_k_B: Tensor
    """int64; 0 is off."""
    top_p_B: Tensor
    """1 is off."""
    min_p_B: Tensor
    """0 is off."""
    repetition_B: Tensor
    """1 is off."""
    presence_B: Tensor
    """0 is off."""
    frequency_B: Tensor
    """0 is off."""
    stages: Stages = field(kw_only=True)

    @classmethod
    def of(cls, rows: Sequence[SamplingValues], device: torch.device | str = "cpu") -> RowSampling:
        """Return the values of these rows on ``device``."""
        columns = zip(*map(_row_of, rows), strict=True)
        tensors = (torch.tensor(column).to(device) for column in columns)
        return cls(*tensors, stages=Stages.of(rows))

    def choose(
        self,
        logits_BV: Tensor,
        seen_BT: Tensor,
        n_prompt: int | Tensor,
        keys_B: Tensor,
        draws: int | Tensor,
        bias_BV: Tensor | None = None,
    ) -> Tensor:
        """Choose the next token of every row, (B,).

        Args:
            logits_BV: Logits of the model, of any dtype.
            seen_BT: Tokens that have occurred; negative entries are ignored.
            n_prompt: Columns of ``seen_BT`` that hold the prompt, for all rows or (B,).
            keys_B: int64 random keys.
            draws: Number of earlier draws, for all rows, or as an int64 tensor (B,) or (1,).
            bias_BV: Added to the logits after the penalties, (B, V) or (1, V); -inf forbids.
        """
        logits_BV = self.penalize(logits_BV.float(), seen_BT, n_prompt)
        if bias_BV is not None:
            logits_BV = logits_BV + bias_BV
        if not self.stages.sampled:
            return logits_BV.argmax(-1)
        token_B = sample_tokens(self.filter(self.warm(logits_BV)), keys_B, draws)
        if not self.stages.greedy:
            return token_B
        return torch.where(self.temperature_B == 0, logits_BV.argmax(-1), token_B)

    def penalize(self, logits_BV: Tensor, seen_BT: Tensor, n_prompt: int | Tensor = 0) -> Tensor:
        """Apply the penalties of tokens that have occurred.

        Repetition divides positive logits and multiplies negative ones (CTRL, arXiv 1909.05858,
        section 4.1). Presence and frequency are those of the OpenAI API: the logit falls by
        presence + frequency times the number of occurrences after the prompt.
        """
        if self.stages.repetition:
            penalty_B1 = self.repetition_B.unsqueeze(1)
            scaled_BV = torch.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
            found_BV = _count(seen_BT, seen_BT >= 0, logits_BV) > 0
            logits_BV = torch.where(found_BV & (penalty_B1 != 1), scaled_BV, logits_BV)
        if self.stages.generated:
            column_T = torch.arange(seen_BT.shape[1], device=seen_BT.device)
            first = n_prompt.view(-1, 1) if isinstance(n_prompt, Tensor) else n_prompt
            count_BV = _count(seen_BT, (seen_BT >= 0) & (column_T >= first), logits_BV)
            fall_BV = count_BV * self.frequency_B.unsqueeze(1) + self.presence_B.unsqueeze(1)
            logits_BV = torch.where(count_BV > 0, logits_BV - fall_BV, logits_BV)
        return logits_BV

    def warm(self, logits_BV: Tensor) -> Tensor:
        """Divide by the temperature; greedy rows stay as they are."""
        temperature_B1 = self.temperature_B.unsqueeze(1)
        return logits_BV / torch.where(temperature_B1 == 0, 1.0, temperature_B1)

    def filter(self, logits_BV: Tensor) -> Tensor:
        """Mask excluded tokens with -inf.

        Each filter applies to the distribution that the previous one left: top-k keeps the k most
        likely tokens, including ties with the k-th; top-p the smallest set of tokens whose
        probability reaches it, at least one (arXiv 1904.09751); min-p tokens at least that many
        times as likely as the most likely one (arXiv 2407.01082).
        """
        n_tokens, stages = logits_BV.shape[1], self.stages
        if stages.top_p:
            ordered_BV, index_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        elif stages.most_k:
            ordered_BV = logits_BV.topk(min(stages.most_k, n_tokens), dim=-1).values
        if stages.most_k:
            k_B1 = self.top_k_B.unsqueeze(1)
            kth_B1 = ordered_BV.gather(1, (k_B1 - 1).clamp(0, ordered_BV.shape[1] - 1))
            floor_B1 = torch.where((k_B1 > 0) & (k_B1 < n_tokens), kth_B1, -torch.inf)
            logits_BV = logits_BV.masked_fill(logits_BV < floor_B1, -torch.inf)
            ordered_BV = ordered_BV.masked_fill(ordered_BV < floor_B1, -torch.inf)
        if stages.top_p:
            top_p_B1 = self.top_p_B.unsqueeze(1)
            probability_BV = ordered_BV.softmax(-1)
            before_BV = probability_BV.cumsum(-1) - probability_BV
            out_BV = (before_BV >= top_p_B1) & (top_p_B1 < 1)
            kept_BV = ordered_BV.masked_fill(out_BV, -torch.inf)
            logits_BV = torch.empty_like(logits_BV).scatter_(1, index_BV, kept_BV)
        if stages.min_p:
            min_p_B1, probability_BV = self.min_p_B.unsqueeze(1), logits_BV.softmax(-1)
            floor_B1 = min_p_B1 * probability_BV.max(-1, keepdim=True).values
            out_BV = (probability_BV < floor_B1) & (min_p_B1 > 0)
            logits_BV = logits_BV.masked_fill(out_BV, -torch.inf)
        return logits_BV


def sample_tokens(logits_BV: Tensor, keys_B: Tensor, draws: int | Tensor) -> Tensor:
    """Sample one token per row from softmax(logits), (B,).

    Gumbel-max sampling with counter-based noise of key and draw number, so that a row's tokens do
    not depend on its batch or on the device.

    Args:
        logits_BV: Logits.
        keys_B: int64 random keys.
        draws: Number of earlier draws, for all rows, or as an int64 tensor (B,) or (1,).
    """
    if isinstance(draws, int):
        draws = keys_B.new_full((1,), draws)  # created on the device, without a copy
    uniform = counter_uniform(keys_B, draws.unsqueeze(1), logits_BV.shape[-1], salt=0).squeeze(1)
    return (logits_BV - torch.log(-torch.log(uniform))).argmax(-1)


def log_probabilities(
    logits_BV: Tensor, token_B: Tensor, n_top: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities in nats of the raw logits: no penalty, bias or temperature.

    Returns:
        (B,) of ``token_B``; (B, n_top) ids of the most likely tokens, and theirs, descending.
    """
    log_p_BV = logits_BV.float().log_softmax(-1)
    top = log_p_BV.topk(min(n_top, log_p_BV.shape[1]), dim=-1)
    return log_p_BV.gather(1, token_B.unsqueeze(1)).squeeze(1), top.indices, top.values


def _row_of(row: SamplingValues) -> tuple[float, ...]:
    """Return the values of a row in the order of the fields of :class:`RowSampling`."""
    numbers = (row.top_p, row.min_p, row.repetition_penalty, row.presence_penalty)
    others = (float(x) for x in (*numbers, row.frequency_penalty))
    return float(row.temperature), int(row.top_k or 0), *others


def _count(seen_BT: Tensor, counts_BT: Tensor, logits_BV: Tensor) -> Tensor:
    """Count how often each token occurs in the entries where ``counts_BT`` is true, (B, V)."""
    ones_BT = counts_BT.to(logits_BV.dtype)
    return torch.zeros_like(logits_BV).scatter_add_(1, seen_BT.clamp_min(0), ones_BT)


def _reject(name: str, value: Any, allowed: str) -> NoReturn:
    raise ConfigError(
        f"{name} is out of range", where=name, value=value, allowed=allowed,
        fix=f"omit {name} to use its default",
    )  # fmt: skip
