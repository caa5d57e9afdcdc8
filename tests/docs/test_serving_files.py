"""The files for several servers: nginx is run, the others are read."""

from __future__ import annotations

import ast
import configparser
import itertools
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from doc_blocks import ROOT

pytest.importorskip("fastapi")

from open_mythos.cli.parser import parse
from open_mythos.inference.server.app import OPEN_PATHS
from open_mythos.inference.server.limits import Limits
from tests.inference.server.fake_host import FakeHost
from tests.inference.server.running import Running, wait_for

FOLDER = ROOT / "examples" / "serving"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture
def behind(tmp_path: Path) -> Iterator[tuple[httpx.Client, Running, Running]]:
    """Two servers of a toy model behind the example's nginx."""
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None:
        pytest.skip("nginx is not installed")
    servers = [Running(FakeHost()), Running(FakeHost())]
    port, text = free_port(), (FOLDER / "nginx.conf").read_text()
    for old, new in [(8001, servers[0].port), (8002, servers[1].port), (8080, port)]:
        assert str(old) in text
        text = text.replace(f"listen {old}", f"listen 127.0.0.1:{new}").replace(
            f":{old}", f":{new}"
        )
    folders = "".join(
        f"{name}_temp_path {tmp_path};\n"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "nginx.conf").write_text(text.replace("http {", f"http {{\n{folders}", 1))
    own = f"daemon off; master_process off; pid {tmp_path}/pid; error_log {tmp_path}/errors;"
    process = subprocess.Popen([nginx, "-p", tmp_path, "-c", "nginx.conf", "-g", own])
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
    try:
        for _ in range(200):
            try:
                client.get("/health/ready")
                break
            except httpx.ConnectError:
                time.sleep(0.05)
        yield client, *servers
    finally:
        client.close()
        process.terminate()
        process.wait(10)
        for server in servers:
            server.end()


def ask(client: httpx.Client, prefix: str = "", **more: Any) -> httpx.Response:
    headers = {"X-Prefix": prefix} if prefix else {}
    return client.post("/v1/completions", json={"prompt": "abc", **more}, headers=headers)


def test_nginx(behind: tuple[httpx.Client, Running, Running]) -> None:
    client, first, second = behind
    counts = lambda: (len(first.host.requests), len(second.host.requests))  # noqa: E731

    for _ in range(6):
        assert ask(client).status_code == 200
    assert counts() == (3, 3), "in turn"

    for prefix in "abcdefgh":
        before = counts()
        for _ in range(3):
            assert ask(client, prefix).status_code == 200
        assert sorted(y - x for x, y in zip(before, counts(), strict=True)) == [0, 3], prefix
    assert all(n > 3 for n in counts()), "prefixes are spread"

    assert client.get("/metrics").status_code == 404
    assert ask(client, nonsense=1).json()["error"]["param"] == "nonsense"
    first.host.refusal = second.host.refusal = "no"
    assert ask(client).status_code == 400
    first.host.refusal = second.host.refusal = ""

    # tokens come one by one, although all of them would fit into a buffer
    for server in (first, second):
        server.host.delay = 0.2
    body = {"prompt": "abc", "max_tokens": 6, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()  # dropped, it would close the connection
        events = (line for line in lines if line.startswith("data: {"))
        for _ in range(3):
            next(events)
        assert first.host.live or second.host.live, "the last token is still to come"
    wait_for(lambda: first.host.cancelled or second.host.cancelled)

    for server in (first, second):
        server.host.delay = 0.0
    before = len(second.host.requests)
    first.end()  # the others are not disturbed
    for prefix in ("", "a", "b", "c", "d"):
        assert ask(client, prefix).status_code == 200
    assert len(second.host.requests) == before + 5


def documents() -> dict[str, Any]:
    parts = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    return {part["kind"]: part for part in parts}


def test_kubernetes() -> None:
    parts = documents()
    assert set(parts) == {"Deployment", "Service", "PodDisruptionBudget"}
    for part in parts.values():
        assert {"apiVersion", "kind", "metadata", "spec"} <= set(part)
    spec = parts["Deployment"]["spec"]
    labels, pod = spec["template"]["metadata"]["labels"], spec["template"]["spec"]
    assert labels == spec["selector"]["matchLabels"] == parts["Service"]["spec"]["selector"]
    assert parts["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    (server,) = pod["containers"]
    assert server["command"] == ["open-mythos"]
    _, values = parse(server["args"])
    assert values["host"] == "0.0.0.0"
    assert values["api_key_file"].startswith("/keys/")
    assert server["livenessProbe"]["httpGet"]["path"] == "/health/live"
    assert server["readinessProbe"]["httpGet"]["path"] == "/health/ready"
    assert {"/health/live", "/health/ready"} <= set(OPEN_PATHS), "probes have no key"
    (port,) = server["ports"]
    assert port["containerPort"] == values["port"]
    assert parts["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    sleep = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > sleep + values["drain_seconds"] + 2
    assert "memory" in server["resources"]["limits"]
    assert {m["name"] for m in server["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_systemd() -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[method-assign, assignment]
    unit.read(FOLDER / "open-mythos.service")
    service = unit["Service"]
    program, *words = service["ExecStart"].split()
    assert program.endswith("/open-mythos")
    _, values = parse(words)
    assert float(service["TimeoutStopSec"]) > values["drain_seconds"] + 2


def test_numbers_of_the_proxy() -> None:
    """Its limits are not below the server's."""
    text, limits = (FOLDER / "nginx.conf").read_text(), Limits()
    numbers = dict(re.findall(r"^ *(\w+) (\w+);", text, re.MULTILINE))
    assert (int(numbers["client_max_body_size"].rstrip("m")) << 20) >= limits.body_bytes
    assert float(numbers["proxy_read_timeout"].rstrip("s")) > limits.timeout_seconds
    assert numbers["proxy_buffering"] == "off"


def test_ray_serve_names_what_exists() -> None:
    """Ray is not installed for the tests: the options that the replica passes are parsed."""
    tree = ast.parse((FOLDER / "ray_serve.py").read_text())
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    flags = [t for t in texts if isinstance(t, str) and t.startswith("--")]
    assert set(flags) == {"--port", "--port-file", "--drain-seconds"}
    pairs = itertools.chain.from_iterable((flag, "1") for flag in flags)
    assert parse(["serve", "T", *pairs])[1]["drain_seconds"] == 1.0
