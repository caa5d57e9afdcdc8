"""Tokens made visible: white space and control characters get signs of their own."""

from __future__ import annotations

import re

_SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}
_RUN = re.compile(r"([␣⏎⇥])\1{3,}")


def visible(text: str) -> str:
    """``text`` with a sign for every character that would not be seen; long runs are counted."""
    signs = (_SIGNS.get(c, c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)
    return _RUN.sub(lambda run: f"{run[1]}×{len(run[0])}", "".join(signs))  # noqa: RUF001
