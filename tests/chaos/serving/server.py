"""The server's process, and what it holds."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from open_mythos.inference.oracle import write_checkpoint

ROOT = Path(__file__).resolve().parents[3]
MODEL = "T"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
START_SECONDS = 60.0


def make_model(folder: Path, seed: int = 1) -> Path:
    """Write a small model with a chat template into ``folder``, and return its path."""
    path = folder / MODEL
    write_checkpoint(str(path), "mla", 8, seed)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


class Held(NamedTuple):
    """What the server's processes hold."""

    files: int
    threads: int
    tasks: int
    bytes: int


class Server:
    """``open-mythos serve`` in a process of its own.

    Args:
        model: Folder of a model.
        folder: For its log and its port.
        options: Further words of the command line.
    """

    def __init__(self, model: Path, folder: Path, *options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log, port_file = folder / "log", folder / "port"
        command = [sys.executable, "-m", "open_mythos", "serve", str(model), "--port", "0"]
        env = os.environ | {
            "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--port-file", str(port_file), *options],
                stdout=log, stderr=log, env=env, cwd=folder,
            )  # fmt: skip
        self.wait_for(port_file.exists)
        self.port = int(port_file.read_text())
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.wait_for(lambda: self.is_ready)

    def wait_for(self, what: Callable[[], object], seconds: float = START_SECONDS) -> float:
        """Wait until ``what()`` is true, and return how many seconds that took."""
        begin = time.monotonic()
        while not what():
            took = time.monotonic() - begin
            if self.process.poll() is not None or took > seconds:
                raise AssertionError(f"not after {took:.1f} s; the server says: {self.text()}")
            time.sleep(0.02)
        return time.monotonic() - begin

    def text(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-4000:]

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests."""
        return self.http.get("/health/ready").status_code == 200

    @property
    def engine(self) -> int:
        """Process id of the engine; the other child renders chats."""
        (pid,) = (pid for pid in children(self.process.pid) if "inference.worker" in command(pid))
        return pid

    def metrics(self) -> dict[str, float]:
        """Every metric by its name and labels, without the common beginning."""
        found = re.findall(r"^open_mythos_(\S+) (\S+)$", self.http.get("/metrics").text, re.M)
        return {name: float(value) for name, value in found}

    def held(self) -> Held:
        """What its processes hold; pages of files, which they share, are not counted."""
        pids = (self.process.pid, *children(self.process.pid))
        files, threads = (
            sum(len(os.listdir(f"/proc/{pid}/{what}")) for pid in pids) for what in ("fd", "task")
        )
        tasks = int(self.metrics()["http_tasks"])
        return Held(files, threads, tasks, sum(map(resident_bytes, pids)))

    def is_idle(self) -> bool:
        """Whether no request waits or runs, and the engine has said so."""
        now = self.metrics()
        names = ("requests_running", "requests_waiting", "slots_used", 'pages{state="held"}')
        return not any(now[name] for name in names)

    def check_books(self) -> None:
        """Wait until it is idle; then every slot and page is free."""
        self.wait_for(self.is_idle, 30)
        now = self.metrics()
        free, cached = now['pages{state="free"}'], now['pages{state="cached"}']
        assert free + cached == self.pages
        assert now["ledger_violations_total"] == 0

    @property
    def pages(self) -> float:
        """All pages of the cache."""
        now = self.metrics()
        return sum(now[f'pages{{state="{state}"}}'] for state in ("free", "cached", "held"))

    def ask(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        """Post a request with defaults."""
        start: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
        start = start if "chat" in path else {"prompt": "hello"}
        return self.http.post(path, json={"model": MODEL, "max_tokens": 4, **start, **body})

    def canary(self) -> Any:
        """Text and log-probabilities that no other request may change."""
        body = {"prompt": "canary ", "max_tokens": 12, "seed": 7, "logprobs": 2, "cache_salt": "c"}
        answer = self.ask(**body, return_token_ids=True, return_loops=True)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"]

    def end(self, how: int = signal.SIGTERM, seconds: float = 60.0) -> int:
        """Send a signal, wait, and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        self.http.close()
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()


@contextmanager
def serving(model: Path, folder: Path, *options: str) -> Iterator[Server]:
    """A server that ends with the block, without an error."""
    server = Server(model, folder, *options)
    try:
        yield server
    except BaseException:
        server.end(signal.SIGKILL)
        raise
    assert server.end() == 0


def children(pid: int) -> list[int]:
    """Return the processes that ``pid`` started from its first thread."""
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command(pid: int) -> str:
    """Return the command line of a process."""
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def resident_bytes(pid: int) -> int:
    """Return the private memory of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(re.findall(r"^RssAnon:\s+(\d+) kB", text, re.M)[0])


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be collected does not."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
