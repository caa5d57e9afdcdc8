"""Routes over a real connection: limits, keys, errors, and what is never shown."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from open_mythos.inference.server.app import OPEN_PATHS, make_app
from open_mythos.inference.server.auth import Keys
from open_mythos.inference.server.errors import MOST_BYTES
from open_mythos.inference.server.limits import Limits
from open_mythos.inference.server.routes import policy_of
from open_mythos.tokenizer import ByteTokenizer
from tests.inference.server.fake_host import FakeHost
from tests.inference.server.running import Running, wait_for

Start = Callable[..., Running]


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert len(answer.content) <= MOST_BYTES
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_routing_errors(shared: Running) -> None:
    client = shared.client
    assert error_of(client.get("/nowhere"), 404)["code"] == "not_found"
    assert error_of(client.get("/v1/completions"), 405)["code"] == "method_not_allowed"
    assert error_of(client.get("/docs"), 404)
    assert error_of(client.get("/openapi.json"), 404)
    assert error_of(client.post("/v1/models/"), 404)


def test_bodies(shared: Running) -> None:
    post = shared.client.post
    path = "/v1/completions"
    assert error_of(post(path, data={"a": "b"}), 415)
    assert error_of(post(path, content=b"{}"), 415)
    head = {"Content-Type": "application/json"}
    gzip = {**head, "Content-Encoding": "gzip"}
    assert error_of(post(path, content=b"{}", headers=gzip), 415)
    assert error_of(post(path, content=b"{", headers=head), 400)["code"] == "invalid_json"
    charset = {"Content-Type": "Application/JSON; charset=utf-8"}
    body = json.dumps({"model": "toy", "prompt": "a"}).encode()
    assert post(path, content=body, headers=charset).status_code == 200


def test_body_length(start: Start) -> None:
    server = start(limits=Limits(body_bytes=1000))
    body = json.dumps({"model": "toy", "prompt": "a", "user": ""}).encode()
    body = body[:-2] + b"x" * (1000 - len(body)) + body[-2:]
    head = {"Content-Type": "application/json"}

    def chunks(data: bytes) -> Any:
        yield from (data[:500], data[500:])

    path = "/v1/completions"
    assert len(body) == 1000
    assert server.client.post(path, content=body, headers=head).status_code == 200
    assert server.client.post(path, content=chunks(body), headers=head).status_code == 200
    assert error_of(server.client.post(path, content=body + b" ", headers=head), 413)
    assert error_of(server.client.post(path, content=chunks(body + b" "), headers=head), 413)


def exchange(server: Running, data: bytes) -> bytes:
    """Send raw bytes and read to the end of the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(data)
        return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    received = b""
    while part := connection.recv(65536):
        received += part
    return received


def send(server: Running, **body: Any) -> socket.socket:
    """Send a request and leave its answer to be read."""
    data = json.dumps({"model": "toy", "prompt": "abc", **body}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    connection.sendall(head.encode() + data)
    return connection


def test_header_length(start: Start) -> None:
    server = start(limits=Limits(header_bytes=2000))

    def sent(length: int) -> httpx.Response:
        fixed = {"Host": "x", "Accept": "a", "Accept-Encoding": "a", "Connection": "close",
                 "User-Agent": "a"}  # fmt: skip
        own = len("/health/live") + sum(len(k) + len(v) + 4 for k, v in fixed.items())
        fixed["Padding"] = "x" * (length - own - len("Padding") - 4)
        return server.client.get("/health/live", headers=fixed)

    assert sent(2000).status_code == 200
    assert error_of(sent(2001), 431)["code"] == "headers_too_long"
    raw = exchange(server, b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"x" * 100_000)
    assert raw.startswith(b"HTTP/1.1 431 ")
    assert b'"code":"headers_too_long"' in raw


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x00\xa5\x01\0\0", b"GET /\r\n\r\n", b"\r\n\r\n\r\nhello\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
    ],
)  # fmt: skip
def test_what_is_no_http(shared: Running, data: bytes) -> None:
    raw = exchange(shared, data)
    assert raw.split(b" ")[1] in (b"400", b"501")
    assert b'"error":{' in raw


def test_slow_clients(start: Start) -> None:
    server = start(limits=Limits(body_seconds=0.2))
    assert exchange(server, b"GET / HTTP/1.1\r\n").startswith(b"HTTP/1.1 408 ")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    raw = exchange(server, head + b"Content-Length: 9\r\n\r\n{")
    assert raw.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in raw


def test_connections(start: Start) -> None:
    server = start(limits=Limits(connections=2))
    held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
    raw = exchange(server, b"")
    assert raw.startswith(b"HTTP/1.1 503 ")
    for each in held:
        each.close()
    wait_for(lambda: exchange(server, b"x\r\n\r\n").startswith(b"HTTP/1.1 400"))


def test_every_route_but_health_asks_for_the_key(start: Start) -> None:
    server = start(keys=Keys(["right-key"]))
    app = make_app(server.service, page="<html></html>")
    paths = [(route.path, method) for route in app.routes for method in route.methods or ()]
    assert {path for path, _ in paths} >= {"/v1/completions", "/v1/models", "/metrics", "/"}
    for path, method in paths:
        if path == "/":
            continue
        answer = server.client.request(method, path)
        if path in OPEN_PATHS:
            assert answer.status_code == 200
        else:
            assert error_of(answer, 401)["code"] == "invalid_api_key"
            wrong = {"Authorization": "Bearer right-keY"}
            assert error_of(server.client.request(method, path, headers=wrong), 401)
            right = {"Authorization": "Bearer right-key"}
            assert server.client.request(method, path, headers=right).status_code != 401
    assert error_of(server.client.get("/nowhere"), 401)
    assert set(OPEN_PATHS) == {"/", "/health", "/health/live", "/health/ready"}


def test_the_page_runs_only_its_own_scripts() -> None:
    page = "<style>a{}</style><script>\nlet a = 1</script><script type='module'>b</script>"
    policy = policy_of(page)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert policy.count("sha256-") == 3
    assert "unsafe" not in policy
    assert policy_of("") == policy_of("<p>")


def test_the_page_is_served(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("open_mythos.inference.server.app.read_page", lambda: "<html>x</html>")
    server = start(keys=Keys(["right-key"]))
    answer = server.client.get("/")
    assert answer.text == "<html>x</html>"
    assert answer.headers["content-security-policy"] == policy_of("<html>x</html>")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"


def test_the_queue(start: Start) -> None:
    """A refusal needs neither the tokenizer nor the engine, and says when to come back."""
    host = FakeHost()
    server = start(host, limits=Limits(queued_requests=1))
    host.held = True
    with send(server) as first:
        wait_for(lambda: host.requests)
        answer = server.post()
        assert error_of(answer, 429)["type"] == "rate_limit_error"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert len(host.requests) == 1
        host.held = False
        assert b'"text_completion"' in read_all(first)
    assert server.post().status_code == 200


def test_expensive_requests_wait_their_turn(start: Start) -> None:
    """8 loops x (3 + 61) tokens = 512 loop-tokens, at 1,000 per second."""
    host = FakeHost()
    server = start(host, limits=Limits(queued_seconds=1))
    host.held = True
    body: dict[str, Any] = {"max_tokens": 61, "n_loops": 8}
    with send(server, **body):
        wait_for(lambda: len(host.requests) == 1)
        tokenizer, server.service.tokenizer = server.service.tokenizer, None
        assert error_of(server.post(**body), 429)["code"] == "queued_seconds"
        chat = server.post("/v1/chat/completions", n_loops=8)
        assert error_of(chat, 429)["code"] == "queued_seconds"
        server.service.tokenizer = tokenizer
        with send(server, max_tokens=58, n_loops=8):  # 488: the limit itself
            wait_for(lambda: len(host.requests) == 2)
            assert error_of(server.post(max_tokens=1, n_loops=2), 429)
    wait_for(lambda: server.service.admission.open == 0)


def test_not_ready(start: Start) -> None:
    host = FakeHost()
    server = start(host)
    for state in ("starting", "stalled", "draining"):
        host.state = state
        assert server.client.get("/health/live").status_code == 200
        for path in ("/health/ready", "/health"):
            assert error_of(server.client.get(path), 503)["code"] == "not_ready"
        answer = server.post()
        assert error_of(answer, 503)
        assert answer.headers["retry-after"]
    host.state = "ready"
    assert server.client.get("/health").status_code == 200


def test_the_served_model_is_the_default(shared: Running) -> None:
    answer = shared.client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 2})
    assert (answer.status_code, answer.json()["model"]) == (200, "toy")


def test_context(shared: Running) -> None:
    assert shared.post(prompt="x" * 200, max_tokens=56).status_code == 200
    error = error_of(shared.post(prompt="x" * 200, max_tokens=57), 400)
    assert (error["param"], error["code"]) == ("max_tokens", "context_length_exceeded")
    assert error_of(shared.post(prompt="x" * 256), 400)["param"] == "prompt"
    assert shared.post(prompt="x" * 256, max_tokens=0, echo=True).status_code == 200
    assert error_of(shared.post(prompt=[320]), 400)["param"] == "prompt"
    chat = "/v1/chat/completions"
    long = [{"role": "user", "content": "x" * 300}]
    assert error_of(shared.post(chat, messages=long), 400)["param"] == "messages"
    short = [{"role": "user", "content": "x" * 150}]
    assert shared.post(chat, messages=short, max_tokens=1).status_code == 200
    answer = shared.post(chat, max_completion_tokens=300)
    assert error_of(answer, 400)["param"] == "max_completion_tokens"
    assert error_of(shared.post(logit_bias={"320": 1}), 400)["param"] == "logit_bias"


def test_a_text_beyond_the_context_is_not_divided_into_tokens(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: 1 / 0)
    long = "x" * 100_000
    for answer in (
        server.post(prompt=long),
        server.post("/v1/chat/completions", messages=[{"role": "user", "content": long}]),
    ):
        assert error_of(answer, 400)["code"] == "context_length_exceeded"


def test_names_of_the_server(start: Start) -> None:
    """A page whose own name leads here may not use it."""

    get = "GET /v1/models HTTP/1.1\r\nConnection: close\r\n"

    def status(server: Running, host: str) -> int:
        raw = exchange(server, f"{get}Host: {host}\r\n\r\n".encode())
        return int(raw.split()[1])

    server = start()
    for host in ("127.0.0.1", f"127.0.0.1:{server.port}", "LOCALHOST:1", "a.localhost", "[::1]:5"):
        assert status(server, host) == 200
    for host in (
        "evil.example",
        f"evil.example:{server.port}",
        "localhost.evil.example",
        "",
        "1.a",
    ):
        assert status(server, host) == 403
    assert status(start(keys=Keys(["k"])), "evil.example") == 401
    assert status(start(address=None), "evil.example") == 200
    assert status(start(address="box.local"), "box.local:80") == 200


def test_a_vocabulary_smaller_than_the_tokenizers(start: Start) -> None:
    host = FakeHost(vocab_size=120)
    server = start(host)
    assert server.post(prompt="ax").status_code == 400
    assert server.post("/v1/chat/completions").status_code == 400, "bos is 256"
    assert server.post(prompt="aw").status_code == 200
    assert host.requests[0].ends == ()


def test_no_template(start: Start) -> None:
    server = start(template=None)
    error = error_of(server.post("/v1/chat/completions"), 400)
    assert "--chat-template" in error["message"]
    assert server.post().status_code == 200


def test_what_reaches_the_engine(start: Start) -> None:
    host = FakeHost()
    server = start(host, keys=Keys(["k1", "k2"]))
    server.client.headers["Authorization"] = "Bearer k1"
    server.post(
        prompt="ab", temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.2,
        presence_penalty=0.3, frequency_penalty=-0.3, logit_bias={"5": 1.5}, logprobs=2,
        exit_rule="gate:0.7", max_loops=6, min_loops=2, cache_salt="s", seed=3, max_tokens=4,
    )  # fmt: skip
    (request,) = host.requests
    assert (request.prompt, request.max_tokens, request.ends) == ((97, 98), 4, (257,))
    assert (request.temperature, request.top_p, request.top_k, request.min_p) == (0.5, 0.9, 5, 0.1)
    penalties = (request.repetition_penalty, request.presence_penalty, request.frequency_penalty)
    assert penalties == (1.2, 0.3, -0.3)
    assert (request.logit_bias, request.logprobs) == (((5, 1.5),), 2)
    assert (request.rule, request.numbers) == ("gate", (0.7,))
    assert (request.max_loops, request.min_loops) == (6, 2)
    first = request.salt
    assert first.endswith("/s")
    server.client.headers["Authorization"] = "Bearer k2"
    server.post(cache_salt="s")
    assert host.requests[-1].salt != first, "keys never share prefixes"
    assert "k1" not in first


def test_salts_are_shared_where_nobody_is_told_apart(start: Start) -> None:
    host = FakeHost()
    start(host).post(cache_salt="s")
    assert host.requests[0].salt == "s"


def test_schemas(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    host = FakeHost()
    server = start(host, limits=Limits(schema_bytes=100))

    def ask(schema: dict[str, Any]) -> httpx.Response:
        shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        return server.post(response_format=shape)

    assert ask({"type": "integer"}).status_code == 200
    assert json.loads(host.requests[0].schema or "") == {"type": "integer"}
    for bad in ({"type": "nonsense"}, {"title": "x" * 100}):
        assert error_of(ask(bad), 400)["param"] == "response_format"
    monkeypatch.setattr("open_mythos.inference.server.guided.find_spec", lambda name: None)
    assert "open-mythos[guided]" in error_of(ask({"type": "integer"}), 400)["message"]


def test_nothing_of_a_client_is_logged(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    secret = "canary-7f3a"
    host = FakeHost()
    with caplog.at_level(logging.INFO):
        server = start(host, keys=Keys([secret + "-key"]))
        server.client.headers["Authorization"] = f"Bearer {secret}-key"
        server.client.headers["X-Header"] = secret
        assert secret in server.post(prompt=secret, max_tokens=40, temperature=0, user=secret).text
        server.post(prompt=secret, stream=True)
        server.post("/v1/chat/completions", messages=[{"role": "user", "content": secret}])
        server.post(prompt=secret, n_loops=secret, **{secret: 1})
        server.client.get(f"/{secret}?{secret}")
        host.refusal = secret
        server.post(prompt=secret)
        server.service.tokenizer = None  # a bug
        answer = server.post(prompt=secret)
        assert error_of(answer, 500)["message"] == "internal error: please report it"
        metrics = server.client.get("/metrics").text
    logged = "".join(each.getMessage() for each in caplog.records if each.name != "httpx")
    assert "unexpected AttributeError at" in logged
    assert secret not in logged
    assert secret not in metrics


def test_metrics(start: Start) -> None:
    host = FakeHost()
    server = start(host)
    host.beat = {"slots": 4, "pages_free": 7, "loop_ticks": 2, "loop_seconds": 0.5}
    server.post(max_tokens=5, n_loops=3)
    server.post(n_loops=0)
    server.client.get("/nowhere")
    text = server.client.get("/metrics").text
    for line in (
        'requests_total{outcome="ok",route="/v1/completions"} 1.0',
        'requests_total{outcome="invalid_value",route="/v1/completions"} 1.0',
        'requests_total{outcome="not_found",route="other"} 1.0',
        "generated_tokens_total 5.0", "prompt_tokens_total 3.0", "requests_running 0.0",
        "requests_waiting 0.0", 'loops_per_token_bucket{le="2.0"} 0.0',
        'loops_per_token_bucket{le="3.0"} 5.0', "time_to_first_token_seconds_count 1.0",
        "inter_token_seconds_count 4.0", "queue_seconds_count 1.0", "engine_up 1.0", "slots 4.0",
        'pages{state="free"} 7.0', 'tick_seconds_sum{stage="loop"} 0.5',
    ):  # fmt: skip
        assert f"open_mythos_{line}\n" in text, line


def test_an_empty_prompt_begins_with_the_token_between_documents(start: Start) -> None:
    host = FakeHost()
    done = start(host).post(prompt=["", "a"], max_tokens=1)
    assert done.status_code == 200, done.text
    assert [request.prompt for request in host.requests] == [(257,), (97,)]
