"""A server of a toy model on localhost, in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import httpx
import openai

from open_mythos.inference.server.chat import ChatTemplate
from open_mythos.inference.server.life import Life, listen
from open_mythos.inference.server.service import Service
from open_mythos.tokenizer import ByteTokenizer
from tests.inference.server.fake_host import FakeHost

TEMPLATE = (
    "{% for message in messages %}{{ bos_token }}{{ message.role }}: {{ message.content }}\n"
    "{% endfor %}assistant:"
)


class Running:
    """A server in a thread, with its host and clients.

    Args:
        host: The toy model.
        parts: Fields of the service; ``template`` is a text, and ``drain_seconds`` the life's.
    """

    def __init__(self, host: FakeHost, **parts: Any) -> None:
        self.host = host
        tok = parts.pop("tokenizer", ByteTokenizer())
        template = parts.pop("template", TEMPLATE)
        self.drain_seconds: float = parts.pop("drain_seconds", 5.0)
        self.sock = listen("127.0.0.1", 0)
        self.port = self.sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=30)
        self.code: int | None = None
        self._error: Exception | None = None
        self._up = threading.Event()
        self._make = lambda: Service(
            host, tok, "toy", template=template and ChatTemplate(template, tok, seconds=5), **parts
        )
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()), daemon=True)
        self._thread.start()
        assert self._up.wait(30)

    async def _live(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.service = self._make()
        self.life = Life(self.service, self.sock, self.drain_seconds)
        life = asyncio.create_task(self.life.run())
        while self.host.state == "starting" and not life.done():
            await asyncio.sleep(0.005)
        self._up.set()
        try:
            self.code = await life
        except Exception as error:
            self._error = error

    def do(self, act: Callable[[], object]) -> None:
        """Run ``act`` in the server's thread and wait for it."""
        done = threading.Event()
        self.loop.call_soon_threadsafe(lambda: (act(), done.set()))
        assert done.wait(10)

    def openai(self, **options: Any) -> openai.OpenAI:
        """The official client."""
        options = {"api_key": "none", "max_retries": 0, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def post(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        """Post a request with defaults."""
        start: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
        start = start if "chat" in path else {"prompt": "abc"}
        return self.client.post(path, json={"model": "toy", **start, **body})

    def end(self) -> None:
        """End as by a signal."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.life.end)
        self.join()

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join(30)
        assert not self._thread.is_alive()
        self.client.close()
        if self._error is not None:
            raise self._error


def wait_for(what: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait until ``what()`` is true."""
    pause = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if what():
            return
        pause.wait(0.01)
    raise AssertionError("it did not happen")
