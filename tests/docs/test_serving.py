"""The page about serving: its curl lines and programs run against a real server."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from doc_blocks import ROOT, metric_names

pytest.importorskip("fastapi")
pytest.importorskip("llguidance")

from open_mythos.inference.oracle import write_checkpoint
from open_mythos.inference.server.metrics import PREFIX
from open_mythos.inference.server.protocol import ChatRequest, Common, CompletionRequest

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
HOME = "localhost:8000"
REFUSED = "# refused"
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def curls() -> Iterator[tuple[str, str | None, bool]]:
    """Address, body and whether it is refused, of every curl line."""
    for block in blocks("sh"):
        command: list[str] = []
        for word in [*shlex.split(block, comments=True), "curl"]:
            if word != "curl":
                command.append(word)
                continue
            urls = [each for each in command if each.startswith(HOME)]
            if urls:
                assert set(command[: command.index(urls[0])]) <= {"-s", "-sN"}
                rest = command[command.index(urls[0]) + 1 :]
                assert not rest or (rest[0], len(rest)) == ("--json", 2), rest
                yield urls[0], rest[1] if rest else None, block.startswith(REFUSED)
            command = []


CURLS = list(curls())


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The command of the page, with a model whose weights are random."""
    folder = tmp_path_factory.mktemp("train")
    write_checkpoint(str(folder), "mla", 4, 0)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    port_file = folder / "port"
    options = ["--model-name", "train", "--allow-unvalidated-depth"]
    options += ["--engine", '{"max_loops": 12}', "--port", "0", "--port-file", str(port_file)]
    command = [sys.executable, "-m", "open_mythos", "serve", str(folder), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(1200):
            assert process.poll() is None
            if port_file.exists():
                url = f"http://127.0.0.1:{port_file.read_text().strip()}"
                if httpx.get(f"{url}/health/ready").status_code == 200:
                    break
            time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        _, log = process.communicate(timeout=40)
    assert process.returncode == 0, log


def send(url: str, address: str, body: str | None) -> httpx.Response:
    address = address.replace(HOME, url)
    if body is None:
        return httpx.get(address)
    headers = {"Content-Type": "application/json"}
    return httpx.post(address, content=body.encode(), headers=headers, timeout=60)


def test_every_field_has_a_curl_line() -> None:
    bodies = [json.loads(body) for _, body, refused in CURLS if body and not refused]
    named = {name for body in bodies for name in body}
    fields = {*CompletionRequest.model_fields, *ChatRequest.model_fields, *Common.model_fields}
    assert named == fields


def test_every_curl_line(url: str) -> None:
    assert len(CURLS) > 25
    for address, body, refused in CURLS:
        answer = send(url, address, body)
        assert answer.status_code == (400 if refused else 200), (body, answer.text)
        if refused:
            assert answer.json()["error"]["param"] in json.loads(body or ""), answer.text
        elif body and json.loads(body).get("stream"):
            assert answer.text.rstrip().endswith("data: [DONE]")
        elif body:
            assert answer.json()["usage"]["completion_tokens"] == 0 or answer.json()["choices"]


def shape(value: Any) -> Any:
    """Names and nesting of a JSON value."""
    if isinstance(value, dict):
        return {name: shape(each) for name, each in value.items()}
    return [shape(value[0])] if isinstance(value, list) else type(value).__name__


def test_the_answer_on_the_page(url: str) -> None:
    (shown,) = map(json.loads, blocks("json"))
    at = PAGE.index("```json")
    before = [body for _, body, _ in CURLS if body and 0 <= PAGE.find(body) < at][-1]
    real = send(url, f"{HOME}/v1/completions", before).json()
    assert shape(real) == shape(shown)
    assert real["choices"][0]["loops"] == shown["choices"][0]["loops"]
    assert real["usage"] == shown["usage"]


def test_the_schema_of_the_page_is_followed(url: str) -> None:
    (body,) = (body for _, body, _ in CURLS if body and "json_schema" in body)
    for seed in range(2):
        fields = json.loads(body) | {"seed": seed}
        (choice,) = send(url, f"{HOME}/v1/completions", json.dumps(fields)).json()["choices"]
        if choice["finish_reason"] == "stop":
            assert json.loads(choice["text"])["y"] in (0, 1)
        else:
            assert choice["text"].startswith("{")


def test_the_official_client(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("py")
    exec(compile(code.replace(f"http://{HOME}", url), "serving.md", "exec"), {})
    assert "[4, 4, 4, 4, 4, 4, 4, 4] 32" in capsys.readouterr().out


def samples(text: str) -> set[str]:
    return set(re.findall(rf"^({PREFIX}\w+)", text, re.MULTILINE))


def shown_names(names: set[str]) -> Callable[[str], bool]:
    return lambda name: any(f"{name}{end}" in names for end in ("", "_bucket", "_count"))


def test_metrics_and_dashboard(url: str) -> None:
    """Every metric of the table comes from a real server, and every name of the dashboard, too."""
    for body in ({"prompt": "x", "max_tokens": 4}, {"prompt": "x", "nonsense": 1}):
        httpx.post(f"{url}/v1/completions", json=body)
    for _ in range(100):  # until a heartbeat has told of a loop
        text = httpx.get(f"{url}/metrics").text
        if f"{PREFIX}tick_rows_count" in text:
            break
        time.sleep(0.1)
    is_shown = shown_names(samples(text))
    assert [name for name in metric_names() if not is_shown(name)] == []
    dashboard = json.loads((ROOT / "docs" / "serving" / "grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    used = {name for each in expressions for name in re.findall(rf"{PREFIX}\w+", each)}
    assert len(used) > 15
    assert used <= samples(text)
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_the_files_exist() -> None:
    for name in re.findall(
        r"^\| `([\w.-]+)` \| ", PAGE.partition("## Beyond one")[2], re.MULTILINE
    ):
        assert (ROOT / "examples" / "serving" / name).is_file(), name
    for image in re.findall(r"!\[[^\]]*\]\((.*?)\)", PAGE):
        assert Path(ROOT / "docs" / image).is_file()
