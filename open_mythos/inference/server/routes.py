"""The routes, and reading and answering of their requests."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import Response
from sse_starlette import EventSourceResponse
from sse_starlette.sse import SendTimeoutError
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from open_mythos.errors import MythosError
from open_mythos.inference.server.answers import Shape
from open_mythos.inference.server.errors import ApiError, to_json
from open_mythos.inference.server.limits import Limits
from open_mythos.inference.server.metrics import CONTENT_TYPE
from open_mythos.inference.server.protocol import (
    ChatRequest,
    Common,
    CompletionRequest,
    parse_body,
)  # fmt: skip
from open_mythos.inference.server.service import Service
from open_mythos.inference.server.streams import Answer, Delta

T = TypeVar("T")


class ClientGone(Exception):
    """The client has closed its connection, or takes nothing."""


def json_response(content: Any, status: int = 200) -> Response:
    """Return a JSON answer."""
    return Response(to_json(content), status, media_type="application/json")


def add_routes(app: FastAPI, service: Service, page: str | None) -> None:
    """Add all routes to the application.

    Args:
        app: The application.
        service: What the routes share.
        page: HTML of the start page, if there is one.
    """

    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request) -> Response:
        return await _generate(service, request, CompletionRequest)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request) -> Response:
        return await _generate(service, request, ChatRequest)

    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        return json_response(_models(service))

    @app.get("/health/live", response_model=None)
    async def live() -> Response:
        return json_response({"status": "live"})

    @app.get("/health", response_model=None)
    @app.get("/health/ready", response_model=None)
    async def ready() -> Response:
        if not service.is_ready:
            raise service.not_ready()
        return json_response({"status": "ready"})

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type=CONTENT_TYPE)

    if page is not None:
        headers = {"Content-Security-Policy": policy_of(page), "X-Content-Type-Options": "nosniff"}

        @app.get("/", response_model=None)
        async def start_page() -> Response:
            return Response(page, headers=headers, media_type="text/html; charset=utf-8")


def policy_of(page: str) -> str:
    """Return a policy that allows the page's own inline scripts and styles, and nothing else."""

    def hashes(tag: str) -> str:
        contents = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page, re.DOTALL)
        found = [base64.b64encode(hashlib.sha256(x.encode()).digest()).decode() for x in contents]
        return " ".join(f"'sha256-{each}'" for each in found) or "'none'"

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _models(service: Service) -> dict[str, Any]:
    if not service.host.facts:
        raise service.not_ready()
    facts = service.host.facts
    names = (
        "context", "weights", "trained_depth", "validated_depth", "max_loops", "vocab_size",
        "slots",
    )  # fmt: skip
    rules = ["none", *(each for each in facts["rules"] if each != "none")]
    model = {
        "id": service.model, "object": "model", "created": service.created,
        "owned_by": "open-mythos", "max_model_len": facts["context"],
        "exit_rules": rules, "system_fingerprint": service.fingerprint,
        "allowed_depth": None if facts["dense"] else service.policy.allowed(facts),
        "chat_template": service.template is not None,
        **{name: facts.get(name) for name in names},
    }  # fmt: skip
    return {"object": "list", "data": [model]}


async def _generate(service: Service, request: Request, kind: type[Common]) -> Response:
    key: str = request.scope["key_name"]
    service.check_open(key)
    body = parse_body(kind, await _read(request, service.limits), service.limits)
    answer, shape = await _unless_gone(request, service.prepare(body, key))
    try:
        await _unless_gone(request, _start(service, answer))
        if body.stream:
            return EventStream(answer, shape, request.scope, service.limits)
        whole = await _unless_gone(request, _collect(answer))
        content = shape.whole(whole, answer.usage(body.n))
    except BaseException:
        answer.close()
        raise
    answer.close()
    return json_response(content)


async def _start(service: Service, answer: Answer) -> None:
    try:
        await answer.start()
    except MythosError as error:
        raise service.submit_error(error) from None


async def _collect(answer: Answer) -> list[Delta]:
    whole = [Delta(index) for index in range(len(answer.choices))]
    async for batch in answer.deltas():
        for delta in batch:
            whole[delta.index].join(delta)
    return whole


async def _read(request: Request, limits: Limits) -> bytes:
    """Return the body.

    Raises:
        ApiError: It is too long, comes too slowly, or is not declared as JSON.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(415, "the content type must be application/json")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "the body must not be compressed")
    too_long = ApiError(413, f"the body is longer than {limits.body_bytes} bytes")
    if int(request.headers.get("content-length", "0")) > limits.body_bytes:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > limits.body_bytes:
                    raise too_long
    except TimeoutError:
        close = {"Connection": "close"}
        what = f"the body did not come within {limits.body_seconds} s"
        raise ApiError(408, what, headers=close) from None
    except ClientDisconnect:
        raise ClientGone from None
    return bytes(body)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``, and cancel it when the client closes the connection.

    Raises:
        ClientGone: It did.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_wait_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.wait({task, gone})


async def _wait_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(EventSourceResponse):
    """Streams an answer; whatever happens, its sequences end with it.

    Args:
        answer: Started.
        shape: Builds the chunks.
        scope: Of the connection; learns how the stream ended.
        limits: Pings, and how long a client may take nothing.
    """

    def __init__(self, answer: Answer, shape: Shape, scope: Scope, limits: Limits) -> None:
        super().__init__(
            self._events(answer, shape, scope), ping=limits.ping_seconds, sep="\n",
            send_timeout=limits.send_seconds,
        )  # fmt: skip
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            raise ClientGone from None
        finally:
            self._answer.close()
        if "outcome" not in scope:  # the client has closed the connection
            raise ClientGone

    @staticmethod
    async def _events(answer: Answer, shape: Shape, scope: Scope) -> AsyncIterator[dict[str, str]]:
        try:
            async for batch in answer.deltas():
                for chunk in shape.chunks(batch):
                    yield _event(chunk)
        except ApiError as error:
            scope["outcome"] = error.code
            yield _event(error.content())
            return
        if shape.body.wants_usage:
            yield _event(shape.last_chunk(answer.usage(shape.body.n)))
        scope["outcome"] = "ok"
        yield {"data": "[DONE]"}


def _event(content: dict[str, Any]) -> dict[str, str]:
    return {"data": to_json(content).decode()}
