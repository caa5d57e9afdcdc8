"""Requests and the events that answer them: data that travels as JSON (loads no torch)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from open_mythos.checks import COLDEST, check_count, check_number, is_id, pick, unknown_key
from open_mythos.errors import ConfigError
from open_mythos.model.exit_syntax import EXIT_SYNTAX, check

MOST_ENDS = 4
"""Most end tokens of a request; every slot has room for so many."""
MOST_LOGPROBS = 20
"""Most alternatives returned with a token."""
RULES = ("none", "gate", "change", "acceleration")
"""Exit rules that look at the state alone."""


class Outcome(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    """An end token was chosen."""
    LENGTH = "length"
    """``max_tokens`` were generated."""
    STOP_STRING = "stop_string"
    """The caller found a stop string in the text."""
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    FAILED = "failed"
    REFUSED = "refused"


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    :meth:`validate` checks what does not depend on a model; vocabulary and context are known to
    the engine alone.
    """

    id: str
    """Unique among the requests that live at the same time."""
    prompt: tuple[int, ...]
    max_tokens: int
    """Most new tokens; 0 only with ``prompt_logprobs``."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of a token and what is added to its logit."""
    key: int = 0
    """Random key; token i is drawn with (key, i)."""
    ends: tuple[int, ...] = ()
    """Tokens that end the request, at most 4."""
    max_loops: int = 1
    """Most loops of a token; 0 for a model without loops."""
    min_loops: int = 1
    """Loops before which the rule's verdict is not used."""
    rule: str = "none"
    """Name of the exit rule."""
    numbers: tuple[float, ...] = ()
    """The rule's parameters, complete."""
    logprobs: int | None = None
    """None: no logprobs; n: the chosen token's, and n alternatives."""
    prompt_logprobs: bool = False
    """Score the prompt; it is then computed whole, without the prefix cache."""
    salt: str = ""
    """Prompts share cached prefixes only if their salts are equal."""
    deadline: float | None = None
    """Time of the scheduler's clock, in seconds, after which the request is ended."""
    schema: str | None = None
    """JSON schema of the output."""

    def validate(self) -> None:
        """Check every field.

        Raises:
            ConfigError: A value is out of range.
        """
        if not self.prompt or not all(map(is_id, self.prompt)):
            raise ConfigError(
                "the prompt is not a list of token ids", where="prompt", value=self.prompt[:8],
                allowed="at least one id >= 0", fix="encode the prompt with the model's tokenizer",
            )  # fmt: skip
        if len(self.ends) > MOST_ENDS:
            raise ConfigError(
                "too many end tokens", where="ends", value=len(self.ends),
                allowed=f"at most {MOST_ENDS}", fix="use stop strings for the others",
            )  # fmt: skip
        for name, bounds in _BOUNDS.items():
            check_number(name, getattr(self, name), **bounds)
        if 0 < self.temperature < COLDEST:
            check_number("temperature", self.temperature, ge=COLDEST)
        for name, least in (("top_k", 0), ("max_loops", 0), ("min_loops", 0), ("key", 0)):
            check_count(name, getattr(self, name), least)
        check_count("max_tokens", self.max_tokens, 0 if self.prompt_logprobs else 1)
        for name in ("top_k", "key"):
            check_number(name, getattr(self, name), lt=1 << 63)
        for end in self.ends:
            check_number("ends", end, ge=0, lt=1 << 63)
        for _, value in self.logit_bias:
            check_number("logit_bias", value, ge=-_LARGEST, le=_LARGEST)
        self._check_rule()
        if self.min_loops > max(self.max_loops, 1):
            raise ConfigError(
                "min_loops is above max_loops", where="min_loops", value=self.min_loops,
                allowed=f"at most {self.max_loops}", fix="lower min_loops or raise max_loops",
            )  # fmt: skip
        if self.logprobs is not None and check_count("logprobs", self.logprobs, 0) > MOST_LOGPROBS:
            raise ConfigError(
                "too many logprobs", where="logprobs", value=self.logprobs,
                allowed=f"0 to {MOST_LOGPROBS}, or None", fix="ask for fewer alternatives",
            )  # fmt: skip
        if self.deadline is not None:
            check_number("deadline", self.deadline)

    def _check_rule(self) -> None:
        pick(RULES, self.rule, "rule", what="exit rule")
        expected = EXIT_SYNTAX[self.rule][0] if self.rule != "none" else ()
        if len(self.numbers) != len(expected):
            raise ConfigError(
                "the rule has other numbers", where="numbers", value=self.numbers,
                allowed=", ".join(each.name for each in expected) or "none",
                fix="name every number of the rule",
            )  # fmt: skip
        for number, value in zip(expected, self.numbers, strict=True):
            whole = number.kind is int and value == value // 1
            check(number, int(value) if whole else value, "numbers")

    def to_json(self, now: float = 0.0) -> dict[str, Any]:
        """Return the fields as JSON types; the deadline as ``timeout``, seconds from ``now``.

        Clocks of two processes have nothing in common, so a deadline never travels.
        """
        values = {each.name: _plain(getattr(self, each.name)) for each in fields(self)}
        deadline = values.pop("deadline")
        return values | {"timeout": None if deadline is None else deadline - now}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], now: float = 0.0) -> Request:
        """Return the request whose :meth:`to_json` is ``values``, received at ``now``.

        Raises:
            ConfigError: There are unknown keys.
        """
        given = {name: _frozen(value) for name, value in values.items()}
        timeout = given.pop("timeout", None)
        given["deadline"] = None if timeout is None else now + timeout
        known = {each.name for each in fields(cls)}
        for name in given.keys() - known:
            raise unknown_key(name, known, "request")
        return cls(**given)


_LARGEST = 1e30
"""Bound of what becomes float32."""
_BOUNDS: dict[str, dict[str, float]] = {
    "temperature": {"ge": 0, "le": _LARGEST}, "top_p": {"gt": 0, "le": 1},
    "min_p": {"ge": 0, "le": 1}, "repetition_penalty": {"gt": 0, "le": _LARGEST},
    "presence_penalty": {"ge": -_LARGEST, "le": _LARGEST},
    "frequency_penalty": {"ge": -_LARGEST, "le": _LARGEST},
}  # fmt: skip


@dataclass(frozen=True)
class Started:
    """A request was admitted: its first prompt chunk is about to run."""

    id: str
    cached_tokens: int
    """Prompt tokens that a prefix hit spares."""


@dataclass(frozen=True)
class Token:
    """A token was chosen."""

    id: str
    token: int
    loops: int
    """Loops run for the position whose logits chose it."""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """Most likely tokens and their logprobs, best first."""


@dataclass(frozen=True)
class PromptScored:
    """The prompt was scored; entry i belongs to prompt token i, and the first has none."""

    id: str
    logprobs: tuple[float | None, ...]
    top: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclass(frozen=True)
class Finished:
    """The last event of a request, exactly one."""

    id: str
    outcome: Outcome
    error: str = ""


Event = Started | Token | PromptScored | Finished
_EVENTS: dict[str, Callable[..., Event]] = {
    "started": Started, "token": Token, "prompt_scored": PromptScored, "finished": Finished,
}  # fmt: skip
_NAMES = {make: name for name, make in _EVENTS.items()}


def event_to_json(event: Event) -> dict[str, Any]:
    """Return an event as JSON types; ``event`` names its kind."""
    values = {each.name: _plain(getattr(event, each.name)) for each in fields(event)}
    return {"event": _NAMES[type(event)]} | values


def event_from_json(values: Mapping[str, Any]) -> Event:
    """Return the event whose :func:`event_to_json` is ``values``."""
    given = {name: _frozen(value) for name, value in values.items() if name != "event"}
    if values["event"] == "finished":
        given["outcome"] = Outcome(given["outcome"])
    return _EVENTS[values["event"]](**given)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value.value if isinstance(value, StrEnum) else value


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
