"""Bodies of requests: the fields of the OpenAI API that are served, and those of looped models.

Types are strict: a boolean is no integer, ``"8"`` and ``8.0`` are neither. An unknown field is an
error, never ignored. Bounds that are options of the server are in :class:`Limits`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from open_mythos.checks import COLDEST
from open_mythos.inference.server.errors import ApiError, from_validation, invalid
from open_mythos.inference.server.limits import Limits

Many = Field(fail_fast=True)
"""Stops at the first invalid element: a list of a million of them costs no more."""
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Many]


class Strict(BaseModel):
    """Base: no conversions, no unknown fields, finite numbers."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def _kind_of_prompt(value: Any) -> str | None:
    if isinstance(value, str):
        return ":text"
    if not isinstance(value, list):
        return None
    first = value[0] if value else None
    return ":texts" if isinstance(first, str) else ":lists" if isinstance(first, list) else ":ids"


Prompt = Annotated[
    Annotated[str, Tag(":text")]
    | Annotated[list[str], Many, Tag(":texts")]
    | Annotated[TokenIds, Tag(":ids")]
    | Annotated[list[TokenIds], Many, Tag(":lists")],
    Discriminator(
        _kind_of_prompt,
        custom_error_type="prompt_type",
        custom_error_message="expected a string, token ids, or a list of either",
    ),
]
OneOrMore = Annotated[
    Annotated[str, Tag(":one")] | Annotated[list[str], Many, Tag(":several")],
    Discriminator(
        lambda value: {str: ":one", list: ":several"}.get(type(value)),
        custom_error_type="string_or_list",
        custom_error_message="expected a string or a list of strings",
    ),
]


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = False


class NamedSchema(Strict):
    """A JSON schema and what a client calls it."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """What the text must look like."""

    type: Literal["text", "json_schema"]
    json_schema: NamedSchema | None = None


class Common(Strict):
    """Fields of both routes."""

    model: str | None = None
    """By default the one that is served."""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1)] = 1
    stop: OneOrMore | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    n_loops: Annotated[int, Field(ge=1)] | None = None
    max_loops: Annotated[int, Field(ge=1)] | None = None
    min_loops: Annotated[int, Field(ge=1)] | None = None
    exit_rule: str | None = None
    exit_threshold: float | None = None
    return_loops: bool = False
    return_token_ids: bool = False
    cache_salt: str = ""
    timeout: Annotated[float, Field(gt=0)] | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def alternatives(self) -> int | None:
        """How many alternatives per token are reported; None: no log-probabilities."""
        raise NotImplementedError

    @property
    def most_tokens(self) -> int | None:
        """The limit of new tokens; None: what the context leaves."""
        raise NotImplementedError

    @property
    def schema_of_text(self) -> dict[str, Any] | None:
        """The JSON schema that the text must follow."""
        shape = self.response_format
        return shape.json_schema.schema_ if shape and shape.json_schema else None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def biases(self, vocab_size: int) -> tuple[tuple[int, float], ...]:
        """Return (id, bias) in the order of ids.

        Raises:
            ApiError: A name is no token id.
        """
        given = self.logit_bias or {}
        if any(not (k.isascii() and k.isdecimal() and len(k) < 12) for k in given):
            raise invalid("logit_bias", "names must be token ids")
        pairs = sorted((int(k), bias) for k, bias in given.items())
        if pairs and pairs[-1][0] >= vocab_size:
            raise invalid("logit_bias", f"token ids must be below {vocab_size}")
        if len({token for token, _ in pairs}) < len(pairs):
            raise invalid("logit_bias", "a token id is named twice")
        return tuple(pairs)

    def check(self, limits: Limits) -> None:
        """Check what depends on several fields or on the server's limits.

        Raises:
            ApiError: 400, with the field.
        """
        if 0 < self.temperature < COLDEST:
            raise invalid("temperature", f"must be 0 (greedy), or {COLDEST} to 2")
        _at_most("n", self.n, limits.choices)
        _at_most("stop", len(self.stops), limits.stops, "strings")
        if not all(0 < len(stop) <= limits.stop_characters for stop in self.stops):
            raise invalid("stop", f"strings must have 1 to {limits.stop_characters} characters")
        _at_most("logit_bias", len(self.logit_bias or ()), limits.biases, "entries")
        _at_most("cache_salt", len(self.cache_salt), limits.salt_characters, "characters")
        _at_most("timeout", self.timeout or 0, limits.timeout_seconds, "seconds")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "needs stream=true")
        shape = self.response_format
        if shape is not None and (shape.type == "json_schema") != (shape.json_schema is not None):
            raise invalid("response_format", "json_schema is needed by its type, and only by it")


class CompletionRequest(Common):
    """Body of ``POST /v1/completions``."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool = False
    best_of: Annotated[int, Field(ge=1)] | None = None

    @property
    def alternatives(self) -> int | None:
        """See the base."""
        return self.logprobs

    @property
    def most_tokens(self) -> int | None:
        """See the base."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All prompts, as texts or as ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        first = self.prompt[0] if self.prompt else None
        many: Any = [self.prompt] if isinstance(first, int) else self.prompt
        return many

    def check(self, limits: Limits) -> None:
        """See the base."""
        super().check(limits)
        _at_most("prompt", len(self.prompts), limits.prompts, "prompts")
        if not self.prompts or [] in self.prompts:
            raise invalid("prompt", "holds no ids")
        _at_most("logprobs", self.logprobs or 0, limits.alternatives)
        if self.max_tokens == 0 and not self.echo:
            raise invalid("max_tokens", "must be at least 1; 0 needs echo=true")
        if self.best_of not in (None, self.n):
            raise invalid("best_of", "must be equal to n")
        if self.echo and self.schema_of_text is not None:
            raise invalid("echo", "does not go with response_format")


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag(":plain")] | Annotated[list[TextPart], Many, Tag(":parts")],
        Discriminator(
            lambda value: {str: ":plain", list: ":parts"}.get(type(value)),
            custom_error_type="content_type",
            custom_error_message="expected a string or a list of text parts",
        ),
    ]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Return role, content and name as strings."""
        parts = [self.content] if isinstance(self.content, str) else [p.text for p in self.content]
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": "".join(parts), **named}


class ChatRequest(Common):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Many]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0)] | None = None

    @property
    def alternatives(self) -> int | None:
        """See the base."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most_tokens(self) -> int | None:
        """See the base."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self, limits: Limits) -> None:
        """See the base."""
        super().check(limits)
        if not self.messages:
            raise invalid("messages", "must not be empty")
        _at_most("messages", len(self.messages), limits.messages, "messages")
        _at_most("top_logprobs", self.top_logprobs or 0, limits.alternatives)
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs", "needs logprobs=true")
        if self.max_tokens == 0:
            raise invalid("max_tokens", "must be at least 1")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise invalid("max_completion_tokens", "is another name of max_tokens; give one")


Body = TypeVar("Body", bound=Common)


def parse_body(kind: type[Body], body: bytes, limits: Limits) -> Body:
    """Parse and check the body of a request, as it came.

    Raises:
        ApiError: 400; ``param`` names the field.
    """
    try:
        parsed = kind.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from None
    parsed.check(limits)
    return parsed


def _at_most(param: str, value: float, most: float, unit: str = "") -> None:
    if value > most:
        raise ApiError(400, f"{param}: at most {most} {unit}".rstrip(), param=param)
