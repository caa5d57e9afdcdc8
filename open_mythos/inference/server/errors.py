"""Errors as the OpenAI API writes them: ``{"error": {message, type, param, code}}``.

A body has at most 2 KB and repeats at most 100 characters of what was sent.
"""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from open_mythos.errors import MythosError

if TYPE_CHECKING:
    from pydantic import ValidationError

LOG = logging.getLogger("open_mythos.server")
MOST_BYTES = 2048
MOST_INPUT = 100
_MOST_ERRORS = 1000
_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    429: "rate_limit_error", 500: "server_error", 503: "service_unavailable_error",
    504: "timeout_error",
}  # fmt: skip
_CODES = {
    400: "invalid_value", 401: "invalid_api_key", 403: "forbidden", 404: "not_found",
    405: "method_not_allowed", 408: "request_timeout", 413: "body_too_long",
    415: "unsupported_media_type", 429: "queue_full", 431: "headers_too_long",
    500: "internal_error", 503: "not_ready", 504: "timeout",
}  # fmt: skip
CLOSED = 499
"""Status, for logs and metrics alone, of a request whose client left."""


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: The HTTP status.
        message: For the client; contains no more than :data:`MOST_INPUT` characters of its input.
        param: The field at fault.
        code: A word for programs; by default one for the status.
        headers: Further headers of the answer.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or _CODES.get(status, "error")
        self.headers = dict(headers or {})

    def content(self) -> dict[str, Any]:
        """Return the body, with a message that is cut where the body would be too long."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": "", "type": kind, "param": self.param, "code": self.code}
        room = MOST_BYTES - len(to_json({"error": error}))
        escaped = to_json(self.message)[1:-1]
        message = self.message
        while len(escaped) > room:
            message = message[: len(message) * room // len(escaped) - 1]
            escaped = to_json(message)[1:-1]
        return {"error": {**error, "message": message}}


def log_bug(error: BaseException) -> None:
    """Log where an unexpected error arose; its message, which may hold a client's text, is not."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    places = " < ".join(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames))
    LOG.error("unexpected %s at %s", type(error).__name__, places)


def to_json(value: Any) -> bytes:
    """Return compact JSON in UTF-8; a lone surrogate becomes a question mark."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode(errors="replace")


def shorten(text: str, most: int = MOST_INPUT) -> str:
    """Cut ``text`` to ``most`` characters."""
    return text if len(text) <= most else text[: most - 3] + "..."


def invalid(param: str, what: str, fix: str = "") -> ApiError:
    """Return the 400 of a field."""
    return ApiError(400, f"{param}: {what}" + (f" ({fix})" if fix else ""), param=param)


def from_validation(error: ValidationError) -> ApiError:
    """Return the 400 of the first field that the schema refuses.

    The alternatives of a union have names that begin with a colon; they are no part of a field.
    """
    if error.error_count() > _MOST_ERRORS:  # listing them all would take seconds
        return ApiError(400, f"{error.error_count()} fields are invalid")
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = [each for each in first["loc"] if not str(each).startswith(":")]
    param = shorten("".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in place)[1:])
    what = {
        "extra_forbidden": "this field is not supported", "missing": "this field is required",
    }.get(first["type"], first["msg"])  # fmt: skip
    if first["type"] == "json_invalid" or not param:
        return ApiError(400, f"the body is not accepted: {shorten(what)}", code="invalid_json")
    return invalid(param, shorten(what, 300))


def from_mythos(error: MythosError, param: str | None, status: int = 400) -> ApiError:
    """Return the answer for one of the library's errors, in its five parts."""
    value = "" if error.value is None else shorten(repr(error.value))
    parts = {"": error.what, "value: ": value, "allowed: ": error.allowed, "to do: ": error.fix}
    message = "; ".join(f"{name}{shorten(text, 400)}" for name, text in parts.items() if text)
    return ApiError(status, f"{param}: {message}" if param else message, param=param)
