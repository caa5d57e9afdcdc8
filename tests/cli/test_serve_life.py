"""The command ``serve`` with a real engine, from its start to a signal."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from helpers import small_model

from open_mythos import save_pretrained
from open_mythos.tokenizer import ByteTokenizer

pytestmark = pytest.mark.slow


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    save_pretrained(small_model(vocab_size=320), folder)
    ByteTokenizer().save(folder / "tokenizer")
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    return folder


@pytest.fixture
def server(checkpoint: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    port_file = tmp_path / "port"
    words = ["serve", str(checkpoint), "--port", "0", "--port-file", str(port_file)]
    command = [sys.executable, "-m", "open_mythos", *words, "--engine", '{"slots": 4}']
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(600):
            assert process.poll() is None
            if port_file.exists():
                url = f"http://127.0.0.1:{port_file.read_text().strip()}"
                if httpx.get(f"{url}/health/ready").status_code == 200:
                    break
            time.sleep(0.1)
        yield process, url
    finally:
        process.kill()
        process.communicate()


def test_from_start_to_signal(server: tuple[subprocess.Popen[str], str]) -> None:
    process, url = server
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert client.models.list().data[0].id == "small"
    fields = {"model": "small", "prompt": "ab", "max_tokens": 6, "seed": 3, "n": 2}
    first = client.completions.create(**fields, extra_body={"return_loops": True, "n_loops": 3})
    again = client.completions.create(**fields, extra_body={"return_loops": True, "n_loops": 3})
    assert first.choices == again.choices
    assert first.choices[0].model_dump()["loops"] == [3] * 6
    messages = [{"role": "user", "content": "hi"}]
    stream = client.chat.completions.create(
        model="small", messages=messages, max_tokens=40, stream=True
    )
    assert next(stream).choices[0].delta.role == "assistant"
    process.send_signal(signal.SIGTERM)
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("length", "stop")
    _, log = process.communicate(timeout=30)
    assert process.returncode == 0, log
    assert "Traceback" not in log
