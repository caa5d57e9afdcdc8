"""The life of the server's process: from listening to the exit code."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from open_mythos.checks import check_number
from open_mythos.errors import EnvironmentError_
from open_mythos.files import write_text
from open_mythos.inference.server.app import make_app
from open_mythos.inference.server.connection import protocol_of
from open_mythos.inference.server.errors import LOG
from open_mythos.inference.server.service import Service

_WATCH_SECONDS = 0.1
_FLUSH_SECONDS = 0.5
_HURRY_SECONDS = 1.0
_BACKLOG = 1024
_MARGIN_BYTES = 1024
"""Of the parser over the limit of headers, which the application checks exactly."""


class QuietServer(uvicorn.Server):
    """A uvicorn server that leaves signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        ConfigError: Not a port.
        EnvironmentError_: The address is taken, or not one of this machine.
    """
    check_number("port", port, ge=0, le=(1 << 16) - 1)
    sock: socket.socket | None = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # with its protocol named, asyncio lets connections send small packets at once
        sock = socket.socket(family, kind, socket.IPPROTO_TCP)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
        return sock
    except OSError as error:
        if sock is not None:
            sock.close()
        raise EnvironmentError_(
            "the server cannot listen there", where="--host, --port", value=f"{host}:{port}",
            allowed="a free port of this machine", fix=f"choose another one ({error.strerror})",
        ) from error  # fmt: skip


def make_server(service: Service) -> QuietServer:
    """Return a server of the application."""
    limits = service.limits
    config = uvicorn.Config(
        make_app(service), http=protocol_of(limits), ws="none", lifespan="off", log_config=None,
        access_log=False, server_header=False, proxy_headers=False, timeout_graceful_shutdown=1,
        h11_max_incomplete_event_size=limits.header_bytes + _MARGIN_BYTES,
    )  # fmt: skip
    return QuietServer(config)


def write_port(file: str, port: int) -> None:
    """Write ``port`` into ``file``, which appears only when it is complete."""
    write_text(Path(file), f"{port}\n", "the port cannot be written", "choose another --port-file")


class Life:
    """Runs a server until a signal or the engine's death.

    Args:
        service: What the routes share.
        sock: Listening.
        drain_seconds: Time for running requests after a signal; after a second one, one second.
    """

    def __init__(self, service: Service, sock: socket.socket, drain_seconds: float) -> None:
        self._service, self._sock, self._drain_seconds = service, sock, drain_seconds
        self._first, self._second = asyncio.Event(), asyncio.Event()

    def end(self) -> None:
        """End after the running requests; called again, within a second."""
        (self._second if self._first.is_set() else self._first).set()

    async def run(self) -> int:
        """Return the exit code: 0 after a signal, 1 if the engine died for good.

        Raises:
            MythosError: The engine cannot start.
        """
        service, server = self._service, make_server(self._service)
        serving = asyncio.create_task(server.serve(sockets=[self._sock]))
        starting = asyncio.create_task(self._start())
        dying = asyncio.create_task(self._watch())
        ending = asyncio.create_task(self._first.wait())
        try:
            await asyncio.wait({starting, serving, ending}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done() and not ending.done():
                starting.result()
                LOG.info("ready")
                await asyncio.wait({dying, serving, ending}, return_when=asyncio.FIRST_COMPLETED)
            if ending.done():
                await self._drain()
            return 0 if ending.done() else 1
        finally:
            service.draining = True
            for task in (starting, dying, ending):
                task.cancel()
            server.should_exit = True
            template = [service.template.close()] if service.template is not None else []
            await asyncio.gather(serving, service.host.stop(), *template)
            await asyncio.gather(starting, dying, ending, return_exceptions=True)

    async def _start(self) -> None:
        if self._service.template is not None:
            await self._service.template.start()
        await self._service.host.start()
        self._service.check_model()

    async def _watch(self) -> None:
        """Return when the engine has died for good; measure how late timers are meanwhile."""
        loop = asyncio.get_running_loop()
        while self._service.host.state != "dead":
            due = loop.time() + _WATCH_SECONDS
            await asyncio.sleep(_WATCH_SECONDS)
            self._service.metrics.lag.observe(max(0.0, loop.time() - due))
        LOG.error("the engine has died, and will not be started again")

    async def _drain(self) -> None:
        """Let running requests end, then give their answers a moment to be sent."""
        service = self._service
        service.draining = True
        LOG.info("ending: %d requests run", service.admission.open)
        draining = asyncio.create_task(service.host.drain(self._drain_seconds))
        hurry = asyncio.create_task(self._second.wait())
        await asyncio.wait({draining, hurry}, return_when=asyncio.FIRST_COMPLETED)
        if not draining.done():
            await service.host.drain(_HURRY_SECONDS)
        draining.cancel()
        hurry.cancel()
        await asyncio.gather(draining, hurry, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_SECONDS):
                while service.admission.open:
                    await asyncio.sleep(_WATCH_SECONDS / 10)


async def serve_until_signal(
    service: Service, sock: socket.socket, *, drain_seconds: float, port_file: str = ""
) -> int:
    """Serve on ``sock`` until SIGTERM or SIGINT; return the exit code.

    Raises:
        MythosError: The engine cannot start.
    """
    life = Life(service, sock, drain_seconds)
    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, life.end)
    if port_file:
        write_port(port_file, sock.getsockname()[1])
    return await life.run()
