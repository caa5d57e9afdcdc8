"""Structured output: whether a JSON schema can be followed (needs the extra ``guided``)."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from typing import Any

from open_mythos.inference.guided import grammar_of
from open_mythos.inference.server.errors import invalid, shorten, to_json
from open_mythos.inference.server.limits import Limits

FIELD = "response_format"


async def checked_schema(schema: dict[str, Any] | None, limits: Limits) -> str | None:
    """Return ``schema`` as JSON text, after compiling it once.

    Raises:
        ApiError: 400: the extra is missing, or the schema is too long or cannot be followed.
    """
    if schema is None:
        return None
    if find_spec("llguidance") is None:
        raise invalid(FIELD, "json_schema needs a package", "pip install open-mythos[guided]")
    text = to_json(schema)
    if len(text) > limits.schema_bytes:
        raise invalid(FIELD, f"the schema has more than {limits.schema_bytes} bytes")
    try:
        work = asyncio.to_thread(_fault, text.decode())
        fault = await asyncio.wait_for(work, limits.schema_seconds)
    except TimeoutError:
        raise invalid(FIELD, f"compiling the schema takes over {limits.schema_seconds} s") from None
    if fault:
        raise invalid(FIELD, f"the schema cannot be followed: {shorten(fault)}")
    return text.decode()


def _fault(schema: str) -> str:
    """Return what is wrong with a schema, or ""."""
    from llguidance import LLMatcher

    try:
        return str(LLMatcher.validate_grammar(grammar_of(schema)) or "")
    except ValueError as error:
        return str(error) or "not a JSON schema"
