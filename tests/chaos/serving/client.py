"""A connection to the server that can be dropped at any point of a request."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import h11

PATH = "/v1/completions"
_READ = 1 << 16


@dataclass
class Reply:
    """What came of a request."""

    status: int | None = None
    """None: the connection ended before an answer."""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    complete: bool = False
    """The answer came to its end."""
    head_seconds: float = 0.0
    """From the request to the head of the answer."""
    seconds: float = 0.0

    @property
    def n_events(self) -> int:
        """Pieces of a stream."""
        return self.body.count(b"data: ")

    @property
    def has_end(self) -> bool:
        """Whether the client knows how its request ended: an answer, an error, or [DONE]."""
        if not self.complete or self.status is None:
            return False
        is_stream = self.headers.get("content-type", "").startswith("text/event-stream")
        return not is_stream or b"[DONE]" in self.body or b'data: {"error"' in self.body

    @property
    def n_tokens(self) -> int:
        """New tokens, where the usage came."""
        found = re.findall(rb'"completion_tokens":(\d+)', self.body)
        return int(found[-1]) if found else 0


class Connection:
    """One connection, and the answer to the request that it sends.

    Args:
        port: Of the server on this machine.
        most_bytes: Room for bytes that this side has not read; None for the system's default.
    """

    def __init__(self, port: int, most_bytes: int | None = None) -> None:
        self.reply = Reply()
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 24)
        self._sock = socket.socket()
        self._sock.setblocking(False)
        if most_bytes is not None:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, most_bytes)
        self._port = port
        self._begin = time.monotonic()

    async def open(self) -> Connection:
        """Connect."""
        await asyncio.get_running_loop().sock_connect(self._sock, ("127.0.0.1", self._port))
        return self

    async def send(self, data: bytes) -> None:
        """Send raw bytes."""
        await asyncio.get_running_loop().sock_sendall(self._sock, data)

    def request(self, body: bytes, path: str = PATH, **headers: str) -> tuple[bytes, bytes]:
        """Return head and body of a POST as bytes, to be sent."""
        self._begin = time.monotonic()
        named = {
            "Host": f"127.0.0.1:{self._port}", "Content-Type": "application/json",
            "Content-Length": str(len(body)), "Connection": "close",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }  # fmt: skip
        head = self._http.send(h11.Request(method="POST", target=path, headers=[*named.items()]))
        content = self._http.send(h11.Data(data=body))
        self._http.send(h11.EndOfMessage())
        assert head is not None
        return head, content or b""

    async def ask(self, body: Mapping[str, Any] | bytes, path: str = PATH, **headers: str) -> None:
        """Send a whole request."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        await self.send(b"".join(self.request(data, path, **headers)))

    async def read(self, events: int | None = None, size: int = _READ) -> Reply:
        """Read to the end, or until so many events of a stream have come."""
        loop = asyncio.get_running_loop()
        while not self.reply.complete and (events is None or self.reply.n_events < events):
            try:
                data = await loop.sock_recv(self._sock, size)
            except ConnectionError:
                break
            if not self._take(data):
                break
        self.reply.seconds = time.monotonic() - self._begin
        return self.reply

    def _take(self, data: bytes) -> bool:
        """Take bytes, none at the end; return whether more may come."""
        reply = self.reply
        try:
            self._http.receive_data(data)
            while (event := self._http.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
                if isinstance(event, h11.Response):
                    reply.status, reply.head_seconds = (
                        event.status_code,
                        time.monotonic() - self._begin,
                    )
                    reply.headers = {k.decode(): v.decode("latin-1") for k, v in event.headers}
                elif isinstance(event, h11.Data):
                    reply.body += bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    reply.complete = True
                    return False
                elif isinstance(event, h11.ConnectionClosed):
                    return False
        except h11.RemoteProtocolError:
            return False
        return bool(data)

    async def drip(self, seconds: float) -> None:
        """Read one byte a second."""
        loop = asyncio.get_running_loop()
        for _ in range(int(seconds)):
            try:
                if not await loop.sock_recv(self._sock, 1):
                    return
            except ConnectionError:
                return
            await asyncio.sleep(1)

    def half_close(self) -> None:
        """Say that nothing more will be sent."""
        self._sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """End the connection without a farewell."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()

    def close(self) -> None:
        """Close."""
        self._sock.close()

    async def __aenter__(self) -> Connection:
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        self.close()


async def ask(
    port: int, body: Mapping[str, Any] | bytes, path: str = PATH, **headers: str
) -> Reply:
    """Send a request on a connection of its own, and return what came."""
    try:
        async with Connection(port) as connection:
            await connection.ask(body, path, **headers)
            return await connection.read()
    except ConnectionError:
        return Reply()
