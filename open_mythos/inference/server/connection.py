"""HTTP connections: limits that lie before the application, answered in the same format."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from open_mythos.inference.server.errors import ApiError, to_json
from open_mythos.inference.server.limits import Limits


def protocol_of(limits: Limits) -> type[H11Protocol]:
    """Return the class of connections under ``limits``."""

    class Connection(H11Protocol):
        """Refuses headers that are too long, too slow or invalid, and too many connections.

        Cuts clients that do not take what they are sent: an answer that waits here outlives its
        request, and closing would wait for it, too.
        """

        _timer: asyncio.TimerHandle | None = None
        _unsent: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            """Begin."""
            super().connection_made(transport)
            # so that writing is paused as soon as anything waits
            transport.set_write_buffer_limits(high=0)
            # for the application: closing would first send what a client does not take
            self.app_state = {**self.app_state, "abort": transport.abort}
            if len(self.connections) > limits.connections:
                self._refuse(ApiError(503, "too many connections", headers={"Retry-After": "5"}))
            else:
                self._watch_headers()

        def data_received(self, data: bytes) -> None:
            """Take bytes."""
            super().data_received(data)
            self._watch_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            """End."""
            self._unwatch()
            self._stop_waiting()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            """Note that the client takes less than it is sent."""
            super().pause_writing()
            self._wait_for_client(self.loop.time() + limits.timeout_seconds)

        def resume_writing(self) -> None:
            """Note that the client has taken everything."""
            self._stop_waiting()
            super().resume_writing()

        def send_400_response(self, msg: str) -> None:
            """Answer what is no valid HTTP."""
            error = sys.exc_info()[1]
            if getattr(error, "error_status_hint", 400) == 431:
                most = limits.header_bytes
                self._refuse(ApiError(431, f"path and headers are longer than {most} bytes"))
            else:
                self._refuse(ApiError(400, "this is not a valid HTTP request", code="invalid_http"))

        @property
        def _awaits_headers(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _watch_headers(self) -> None:
            """Give the client a limited time for the headers of a request."""
            if not self._awaits_headers or self.transport.is_closing():
                self._unwatch()
            elif self._timer is None:
                self._timer = self.loop.call_later(limits.body_seconds, self._too_slow)

        def _unwatch(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _wait_for_client(self, end: float) -> None:
            """Look again after a while whether the client has taken anything."""
            self._unsent = self.loop.call_later(
                limits.send_seconds, self._look, self.transport.get_write_buffer_size(), end
            )

        def _look(self, unsent: int, end: float) -> None:
            if self.transport.get_write_buffer_size() < unsent and self.loop.time() < end:
                self._wait_for_client(end)
            else:
                self.transport.abort()

        def _stop_waiting(self) -> None:
            if self._unsent is not None:
                self._unsent.cancel()
                self._unsent = None

        def _too_slow(self) -> None:
            self._timer = None
            if self._awaits_headers and not self.transport.is_closing():
                self._refuse(ApiError(408, "the headers did not come in time"))

        def _refuse(self, error: ApiError) -> None:
            """Answer and close; an answer that has begun is cut."""
            body = to_json(error.content())
            headers = {
                **error.headers, "Content-Type": "application/json",
                "Content-Length": str(len(body)), "Connection": "close",
            }  # fmt: skip
            try:
                response = h11.Response(
                    status_code=error.status, headers=list(headers.items()),
                    reason=STATUS_PHRASES[error.status],
                )  # fmt: skip
                for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
            except h11.LocalProtocolError:
                pass
            self.transport.close()

    return Connection
