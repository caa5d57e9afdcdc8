"""Renders a chat template in a process of its own, which the system kills when it takes too long.

JSON lines on stdin and stdout: first ``{"template": text, "names": {...}, "seconds": s, "bytes":
n}``, answered by ``{"ready": true}``; then ``{"messages": [...]}``, each answered by ``{"text":
text}``; an ``{"error": text}`` may be the answer to both.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from contextlib import suppress
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 1 << 30


def environment() -> ImmutableSandboxedEnvironment:
    """Return the environment that templates of the Hugging Face hub expect."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    # jinja's own filter escapes for HTML
    found.filters["tojson"] = lambda value, **more: json.dumps(value, ensure_ascii=False, **more)
    found.globals["raise_exception"] = raise_exception
    return found


def render(template: Template, values: dict[str, Any], most: int) -> str:
    """Return the text of a chat, of at most ``most`` bytes.

    Raises:
        ValueError: It is longer.
    """
    pieces, size = [], 0
    for piece in template.generate(values):
        size += len(piece.encode(errors="replace"))
        if size > most:
            raise ValueError(f"the chat becomes longer than {most} bytes")
        pieces.append(piece)
    return "".join(pieces)


def limited(
    template: Template, values: dict[str, Any], seconds: float, most: int
) -> dict[str, str]:
    """Render within ``seconds`` of CPU time; beyond them the system ends this process."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return {"text": render(template, values, most)}
    except MemoryError:
        return {"error": "the template needs too much memory"}
    except Exception as error:  # a template may raise anything
        return {"error": f"{type(error).__name__}: {error}"[:200]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    """Serve until the end of stdin."""
    for each in (signal.SIGINT, signal.SIGTERM):  # the parent ends this process by closing stdin
        signal.signal(each, signal.SIG_IGN)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    setup = json.loads(sys.stdin.readline())
    try:
        template = environment().from_string(setup["template"])
    except TemplateError as error:
        _answer({"error": f"{type(error).__name__}: {error}"[:200]})
        return
    _answer({"ready": True})
    for line in sys.stdin:
        values = {**setup["names"], **json.loads(line), "add_generation_prompt": True}
        _answer(limited(template, values, setup["seconds"], setup["bytes"]))


def _answer(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
