"""The application: routes behind a gate that checks keys and turns every failure into an answer."""

from __future__ import annotations

import asyncio
import logging
import time
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from open_mythos.inference.server.auth import is_own_name
from open_mythos.inference.server.errors import CLOSED, LOG, ApiError, log_bug, to_json
from open_mythos.inference.server.routes import ClientGone, add_routes
from open_mythos.inference.server.service import Service

OPEN_PATHS = ("/", "/health", "/health/live", "/health/ready")
"""Paths that need no key: the page holds no data, and its calls ask for the key."""


def make_app(service: Service, page: str | None = None) -> FastAPI:
    """Return the application.

    Args:
        service: What the routes share.
        page: HTML of the start page; by default the package's ``page.html``, if there is one.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    add_routes(app, service, read_page() if page is None else page)
    app.add_exception_handler(HTTPException, _routing_error)
    app.add_exception_handler(ApiError, _api_error)
    paths = frozenset(getattr(route, "path", "") for route in app.routes)
    app.add_middleware(Gate, service=service, paths=paths)
    return app


def read_page() -> str | None:
    """Return the start page of the package."""
    file = resources.files(__package__).joinpath("page.html")
    return file.read_text(encoding="utf-8") if file.is_file() else None


async def _routing_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    allowed = (error.headers or {}).get("Allow", "")
    texts = {404: "no such route", 405: f"the method must be {allowed}".rstrip()}
    what = texts.get(error.status_code, "the request is not accepted")
    return await _api_error(request, ApiError(error.status_code, what, headers=error.headers))


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.scope["outcome"] = error.code
    return error_response(error)


def error_response(error: ApiError) -> Response:
    """Return the answer of an error."""
    return Response(
        to_json(error.content()), error.status, error.headers, media_type="application/json"
    )


class Gate:
    """Checks headers and key before a route, and logs and counts after it.

    Logs hold method, route, status and time; nothing that a client wrote.
    """

    def __init__(self, app: ASGIApp, service: Service, paths: frozenset[str]) -> None:
        self._app, self._service, self._paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        failure: ApiError | None = None
        try:
            scope["key_name"] = self._check(scope)
            await self._app(scope, receive, noted)
        except ApiError as error:
            failure = error
        except ClientGone:
            await _hang_up(scope)
            scope["outcome"], status = "disconnected", CLOSED
        except Exception as error:
            log_bug(error)
            failure = ApiError(500, "internal error: please report it")
        if failure is not None:
            scope["outcome"] = failure.code
            if not status:
                await error_response(failure)(scope, receive, noted)
        self._note(scope, status, time.perf_counter() - begin)

    def _check(self, scope: Scope) -> str:
        """Return the name of the request's key."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        size = sum(len(name) + len(value) + 4 for name, value in headers)
        size += len(scope.get("raw_path") or b"") + len(scope["query_string"])
        if size > self._service.limits.header_bytes:
            most = self._service.limits.header_bytes
            raise ApiError(431, f"path and headers are longer than {most} bytes")
        if scope["path"] in OPEN_PATHS:
            return ""
        self._check_host(headers)
        given = next((value for name, value in headers if name == b"authorization"), b"")
        name = self._service.keys.name_of(given)
        if name is None:
            raise ApiError(
                401, "a valid API key is needed: Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        return name

    def _check_host(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Refuse what only a browser that was led astray would send."""
        address = self._service.address
        if self._service.keys or address is None:
            return
        if not all(is_own_name(value, address) for name, value in headers if name == b"host"):
            raise ApiError(
                403, f"the Host header must name this server: {address}, localhost, or an "
                "IP address", code="wrong_host",
            )  # fmt: skip

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope["path"] if scope["path"] in self._paths else "other"
        outcome: str = scope.get("outcome") or ("ok" if status < 400 else str(status))
        metrics = self._service.metrics
        metrics.requests.labels(route, outcome).inc()
        metrics.request_seconds.observe(seconds)
        if status in (429, 503):
            metrics.rejected.labels(outcome).inc()
        method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD") else "other"
        level = logging.DEBUG if route in OPEN_PATHS and status < 500 else logging.INFO
        LOG.log(level, "%s %s %d %s %.3f s", method, route, status, outcome, seconds)


async def _hang_up(scope: Scope) -> None:
    """Drop the connection with what is still to be sent: a client that takes nothing would keep it.

    The server puts ``abort`` into the state of the connection.
    """
    abort: Any = scope.get("state", {}).get("abort")
    if abort is not None:
        abort()
        await asyncio.sleep(0)  # until the connection knows
