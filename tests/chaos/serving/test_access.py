"""R25: who may ask what, and what is never written down."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from chaos.serving.server import ROOT, Server, command, serving
from open_mythos.inference.server.app import OPEN_PATHS

KEY, PROMPT, HEADER, SALT = "key-canary-1", "prompt-canary-2", "header-canary-3", "salt-canary-4"
CANARIES = (KEY, PROMPT, HEADER, SALT)
ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/metrics", *OPEN_PATHS)


@pytest.mark.goal("R25", "every route without a key; texts that must not be written down")
def test_keys_and_logs(served_model, tmp_path, row):
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    right = {"Authorization": f"Bearer {KEY}", "X-Header": HEADER}
    place = tmp_path / "server"
    with serving(served_model, place, "--host", "0.0.0.0", "--api-key-file", str(keys)) as server:
        for path in (*ROUTES, "/docs", "/openapi.json", "/v1", f"/{PROMPT}"):
            for method in ("GET", "POST", "PUT", "OPTIONS", "HEAD"):
                status = server.http.request(method, path).status_code
                expected = {200, 405} if path in OPEN_PATHS else {401}
                assert status in expected, (method, path, status)
                wrong = {"Authorization": f"Bearer {KEY}x"}
                assert server.http.request(method, path, headers=wrong).status_code in expected
                row.count()
        server.http.headers.update(right)
        answers = [_answer(server, stream=stream) for stream in (False, True)]
        _provoke_errors(server)
        metrics = server.http.get("/metrics").text
        listing = " ".join(command(pid) for pid in (server.process.pid, server.engine))
    written = server.log.read_text() + metrics + listing
    for canary in (*CANARIES, *answers):
        assert canary not in written
    row.outcome = "401 for all but start page and health; no prompt, key, header or output written"


def _answer(server: Server, stream: bool) -> str:
    """Return the text of an answer, at least so much that it cannot appear by chance."""
    answer = server.ask(
        prompt=PROMPT, max_tokens=40, cache_salt=SALT, stream=stream, user=PROMPT,
        logit_bias={"257": -100, **{str(i): 50 for i in range(97, 123)}},
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    if stream:
        return "no text of a stream is in one piece"
    text: str = answer.json()["choices"][0]["text"]
    assert len(text) == 40
    return text[:12]


def _provoke_errors(server: Server) -> None:
    """Every kind of refusal, with a canary in the field at fault."""
    for change in (
        {"model": PROMPT}, {"prompt": PROMPT * 200}, {"stop": [PROMPT * 40]}, {PROMPT: 1},
        {"exit_rule": PROMPT}, {"logit_bias": {PROMPT: 1}}, {"response_format": {"type": PROMPT}},
    ):  # fmt: skip
        assert server.ask(**change).status_code in (400, 404)
    server.http.post(f"/{PROMPT}?{PROMPT}", content=PROMPT)
    head = {"Content-Type": "application/json"}
    assert server.http.post("/v1/completions", content=PROMPT, headers=head).status_code == 400


@pytest.mark.goal("R25", "addresses beyond this machine, without a key")
def test_addresses_without_a_key(served_model: Path, row):
    for host in ("0.0.0.0", "::"):
        words = [sys.executable, "-m", "open_mythos", "serve", str(served_model), "--host", host]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert "--api-key-file" in done.stderr
        assert "Traceback" not in done.stderr
        row.count()
    row.outcome = "exit 2, with what to do"


@pytest.mark.goal("R25", "pages of other sites whose name leads to this machine")
def test_names_of_other_sites(server, row):
    for host in (
        "evil.example",
        "evil.example:80",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
    ):
        for path in ("/v1/models", "/metrics", "/v1/completions"):
            assert server.http.get(path, headers={"Host": host}).status_code == 403
            row.count()
    simple = {"Content-Type": "text/plain", "Origin": "http://evil.example"}
    answer = server.http.post("/v1/completions", content="{}", headers=simple)
    assert answer.status_code == 415, "a browser would not ask before it sends this"
    asks = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answer = server.http.options("/v1/completions", headers=asks)
    assert "access-control-allow-origin" not in answer.headers
    row.outcome = "403; no page of another origin may read or send"
