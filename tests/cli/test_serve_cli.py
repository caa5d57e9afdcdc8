"""The command ``serve``: its options, and what it loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from open_mythos.cli import main
from open_mythos.cli.parser import parse
from open_mythos.inference.options import EngineOptions
from open_mythos.inference.server.limits import Limits

LIGHT = """
import sys
from open_mythos.cli import main
try: main(["serve", "--help"])
except SystemExit: pass
heavy = {"torch", "fastapi", "pydantic", "uvicorn", "jinja2", "prometheus_client"}
sys.exit(bool(heavy & set(sys.modules)))
"""
NO_TORCH = """
import sys
import open_mythos.inference.server.life
import open_mythos.inference.server.host
import open_mythos.hub.places
sys.exit("torch" in sys.modules)
"""


@pytest.mark.parametrize("code", [LIGHT, NO_TORCH])
def test_what_is_loaded(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_options() -> None:
    words = ["serve", "T", "--port", "0", "--limits.body-bytes", "5", "--limits.choices=2"]
    _, values = parse([*words, "--insecure", "--drain-seconds", "1.5", "--engine.slots", "3"])
    assert values["limits"] == Limits(body_bytes=5, choices=2)
    assert (values["port"], values["insecure"], values["drain_seconds"]) == (0, True, 1.5)
    assert values["engine"] == EngineOptions(slots=3)


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["T", "--host", "0.0.0.0"], "--api-key-file", 2),
        (["T", "--api-key-file", "nowhere"], "API keys", 3),
        (["T", "--exit-rule", "kl"], "--exit-rule", 2),
        (["T", "--exit-rule", "gat"], "--exit-rule", 2),
        (["T", "--limits.choices", "0"], "limits.choices", 2),
        (["T", "--limits.choces", "1"], "limits.choices", 2),
        (["T", "--drain-seconds", "-1"], "drain_seconds", 2),
        (["nowhere"], "no model there", 3),
        (["T", "--chat-template", "nowhere", "--tokenizer", "byte"], "chat template", 3),
        (["T"], "tokenizer", 3),
    ],
)
def test_usage_errors(
    words: list[str], message: str, code: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "T").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "T" / name).touch()
    assert main(["serve", *words]) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
