"""Several servers as replicas of Ray Serve, which places, counts and restarts them.

Each replica runs ``open-mythos serve`` and passes requests on to it, streams included:

    pip install open-mythos[serve] "ray[serve]" httpx
    SERVE="open-mythos serve runs/train" serve run examples.serving.ray_serve:app

Answers are those of the server, at http://localhost:8000/v1/completions.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
import time
from pathlib import Path

import httpx
from ray import serve
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import StreamingResponse

START_SECONDS = 600.0
DRAIN_SECONDS = 30.0
DROPPED = {"connection", "content-length", "date", "host", "server", "transfer-encoding"}
"""Headers of one connection."""


@serve.deployment(
    num_replicas=2,
    max_ongoing_requests=300,  # the server's own queue refuses earlier, and says when to come back
    ray_actor_options={"num_cpus": 1},
    health_check_period_s=5,
    graceful_shutdown_timeout_s=DRAIN_SECONDS + 10,
)
class Replica:
    """A server of its own process.

    Args:
        command: Command line that serves the model.
    """

    def __init__(self, command: list[str]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        port_file = Path(self.folder.name) / "port"
        words = ["--port", "0", "--port-file", str(port_file)]
        words += ["--drain-seconds", str(DRAIN_SECONDS)]
        self.process = subprocess.Popen([*command, *words])
        end = time.monotonic() + START_SECONDS
        while not self._is_ready(port_file):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("the server did not start: see its messages above")
            time.sleep(0.1)
        self.client = httpx.AsyncClient(base_url=self.url, timeout=None)

    def _is_ready(self, port_file: Path) -> bool:
        if not port_file.exists():
            return False
        self.url = f"http://127.0.0.1:{port_file.read_text().strip()}"
        return httpx.get(f"{self.url}/health/ready").status_code == 200

    def check_health(self) -> None:
        """Ray replaces a replica whose server has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"the server ended with {self.process.returncode}")

    async def __call__(self, request: Request) -> StreamingResponse:
        """Pass a request on, and its answer back as it comes."""
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in DROPPED]
        path = f"{request.url.path}?{request.url.query}".rstrip("?")
        call = self.client.build_request(
            request.method, path, headers=headers, content=await request.body()
        )
        answer = await self.client.send(call, stream=True)
        kept = {k: v for k, v in answer.headers.items() if k.lower() not in DROPPED}
        # a client that leaves ends the stream, which ends the request in the server
        return StreamingResponse(
            answer.aiter_raw(), answer.status_code, kept, background=BackgroundTask(answer.aclose)
        )

    def __del__(self) -> None:
        if hasattr(self, "process"):
            self.process.terminate()
            self.process.wait(DRAIN_SECONDS + 5)


app = Replica.bind(shlex.split(os.environ.get("SERVE", "open-mythos serve runs/train")))
