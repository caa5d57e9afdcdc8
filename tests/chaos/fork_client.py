"""The other end of the fork server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 120.0
"""Seconds after which a job counts as hung; nothing waits for it otherwise."""


@dataclass(frozen=True)
class End:
    """How a job ended."""

    code: int
    """Exit code; minus the number of the signal that ended it."""
    sent: bool
    """Whether the signal that was asked for has been sent."""
    said: str
    """What it wrote on standard error."""
    value: Any
    """What its function returned; None if it did not."""


class Forks:
    """Runs functions in forks of a process that is warm.

    Args:
        folder: For the jobs' standard error and results.
        keep: Descriptors that the server and its jobs keep open.
        warm: Whether the server is ready for a run before it forks; False for other jobs.
    """

    def __init__(self, folder: Path, keep: tuple[int, ...] = (), warm: bool = True) -> None:
        self._folder, self._jobs = folder, 0
        self._server = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "chaos.fork_server", *(["warm"] if warm else [])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            # a signal from the terminal is for the tests; they end the server
            start_new_session=True, pass_fds=keep,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            self.pid = int(self._answer()["ready"])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the server go, and wait until it has."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait()

    def run(
        self,
        call: Callable[..., Any],
        *,
        after: float | None = None,
        signal: int = 9,
        since: str = "fork",
        **arguments: Any,
    ) -> End:
        """Call a function of a module in a fork, and wait until that is gone.

        Args:
            call: Importable by its name; its arguments and its value are JSON.
            after: Send it a signal after this many seconds.
            signal: Which.
            since: Whether they count from the "fork", or from the "begin" of what it does.
            arguments: Of ``call``.
        """
        job = self.start(call, after=after, signal=signal, since=since, **arguments)
        end = self._answer()
        said = Path(job["stderr"])  # a job may die before it has made it
        text = said.read_text() if said.exists() else ""
        assert not end["hung"], f"{job} hung and said: {text}"
        value = json.loads(Path(job["result"]).read_text()) if end["code"] == 0 else None
        return End(end["code"], end["sent"], text, value)

    def start(
        self,
        call: Callable[..., Any],
        *,
        after: float | None = None,
        signal: int = 9,
        since: str = "fork",
        **arguments: Any,
    ) -> dict[str, Any]:
        """:meth:`run` without waiting; one job at a time."""
        self._jobs += 1
        said, result = (self._folder / f"{self._jobs}.{kind}" for kind in ("stderr", "json"))
        job = {
            "call": f"{call.__module__}:{call.__name__}", "arguments": arguments,
            "stderr": str(said), "result": str(result), "limit": LIMIT,
            "after": after, "signal": int(signal), "from": since,
        }  # fmt: skip
        assert self._server.stdin is not None
        print(json.dumps(job), file=self._server.stdin)
        return job

    def _answer(self) -> dict[str, Any]:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError(f"the fork server has gone with code {self._server.wait()}")
        return json.loads(line)
