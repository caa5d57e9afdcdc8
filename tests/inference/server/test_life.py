"""The life of a server: readiness, draining, the engine's death, exit codes."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from open_mythos.errors import ConfigError, DataError, EnvironmentError_
from open_mythos.inference.server.life import listen, write_port
from tests.inference.server.fake_host import FakeHost
from tests.inference.server.running import Running, wait_for

Start = Callable[..., Running]


class Asking:
    """A request in a thread."""

    def __init__(self, server: Running, **body: object) -> None:
        self.status: int | None = None
        self.text = ""
        self._thread = threading.Thread(target=self._ask, args=(server, body))
        self._thread.start()

    def _ask(self, server: Running, body: dict[str, object]) -> None:
        fields = {"model": "toy", "prompt": "abc", "temperature": 0, **body}
        with httpx.Client(base_url=server.url, timeout=30) as client:
            answer = client.post("/v1/completions", json=fields)
        self.status, self.text = answer.status_code, answer.text

    def join(self) -> None:
        self._thread.join(30)


def test_running_requests_end_and_new_ones_are_refused(start: Start) -> None:
    host = FakeHost()
    server = start(host)
    host.stalled = True
    asking = [Asking(server), Asking(server, stream=True)]
    wait_for(lambda: len(host.live) == 2)
    server.do(server.life.end)
    wait_for(lambda: host.state == "draining")
    assert server.client.get("/health/live").status_code == 200
    assert server.client.get("/health/ready").status_code == 503
    refused = server.post()
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    host.stalled = False
    server.join()
    for each in asking:
        each.join()
        assert each.status == 200
    assert asking[1].text.endswith("data: [DONE]\n\n")
    assert server.code == 0


def test_what_takes_longer_than_draining_has_an_error(start: Start) -> None:
    host = FakeHost()
    server = start(host, drain_seconds=0.1)
    host.stalled = True
    asking = [Asking(server), Asking(server, stream=True)]
    wait_for(lambda: len(host.live) == 2)
    server.end()
    for each in asking:
        each.join()
    assert asking[0].status == 503
    assert '{"error":{"message":"the request was ended: the server is shutting' in asking[1].text
    assert "[DONE]" not in asking[1].text
    assert server.code == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))


def test_a_second_signal_hurries(start: Start) -> None:
    host = FakeHost()
    server = start(host, drain_seconds=1000.0)
    host.stalled = True
    asking = Asking(server)
    wait_for(lambda: host.live)
    server.do(server.life.end)
    server.end()
    asking.join()
    assert asking.status == 503
    assert server.code == 0


def test_the_death_of_the_engine_ends_the_server(start: Start) -> None:
    host = FakeHost()
    server = start(host)
    host.stalled = True
    asking = [Asking(server), Asking(server, stream=True)]
    wait_for(lambda: len(host.live) == 2)
    server.do(host.die)
    server.join()
    for each in asking:
        each.join()
        assert "engine died" in each.text
    assert asking[0].status == 503
    assert server.code == 1


def test_a_restart_of_the_engine_is_survived(start: Start) -> None:
    host = FakeHost()
    server = start(host)
    host.state = "starting"
    assert server.post().status_code == 503
    host.state = "ready"
    assert server.post().status_code == 200


def test_an_engine_that_cannot_start() -> None:
    class Broken(FakeHost):
        async def start(self) -> None:
            self.state = "dead"
            raise DataError("no model there")

    server = Running(Broken())
    with pytest.raises(DataError):
        server.join()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))


def test_a_template_that_is_not_valid() -> None:
    server = Running(FakeHost(), template="{% for %}")
    with pytest.raises(DataError, match="template"):
        server.join()


def test_a_tokenizer_of_another_model() -> None:
    server = Running(FakeHost(vocab_size=321))
    with pytest.raises(DataError, match="vocabulary"):
        server.join()


def test_a_signal_while_the_engine_starts() -> None:
    class Slow(FakeHost):
        async def start(self) -> None:
            self.state = "loading"
            while self.state == "loading":
                await asyncio.sleep(0.01)

    server = Running(Slow())
    assert server.client.get("/health/live").status_code == 200
    assert server.client.get("/health/ready").status_code == 503
    assert server.client.get("/v1/models").status_code == 503
    assert server.post().status_code == 503
    server.end()
    assert server.code == 0


def test_small_packets_are_sent_at_once() -> None:
    """Otherwise each answer waits 40 ms for an acknowledgement."""

    class Seen(asyncio.Protocol):
        no_delay: int | None = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            sock = transport.get_extra_info("socket")
            Seen.no_delay = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            transport.close()

    async def run() -> None:
        sock = listen("127.0.0.1", 0)
        server = await asyncio.get_running_loop().create_server(Seen, sock=sock)
        reader, writer = await asyncio.open_connection(*sock.getsockname())
        await reader.read()
        writer.close()
        server.close()

    asyncio.run(run())
    assert Seen.no_delay


def test_addresses_that_are_taken(start: Start) -> None:
    server = start()
    for host, port in (("127.0.0.1", server.port), ("192.0.2.1", 0), ("no.such.invalid", 0)):
        with pytest.raises(EnvironmentError_):
            listen(host, port)


@pytest.mark.parametrize("port", [-1, 70_000, 1 << 70])
def test_what_is_no_port(port: int) -> None:
    with pytest.raises(ConfigError, match="port"):  # the system would take another one
        listen("127.0.0.1", port)


def test_the_port_file(tmp_path: Path) -> None:
    file = tmp_path / "port"
    write_port(str(file), 123)
    assert file.read_text() == "123\n"
    assert list(tmp_path.iterdir()) == [file]
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EnvironmentError_, match="a link"):
        write_port(str(tmp_path / "link"), 123)
