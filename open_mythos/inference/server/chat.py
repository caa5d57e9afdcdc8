"""Chat messages to token ids, by the model's template (this module loads no torch).

Special tokens that the template writes become their ids. Those that a message spells out stay
text: a mark is put into them before the template sees the message, and removed from its text.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from open_mythos.errors import DataError, EnvironmentError_
from open_mythos.files import read_text
from open_mythos.tokenizer import SPECIALS, Tokenizer

MOST_TEMPLATE_BYTES = 1 << 20
_START_SECONDS = 60.0
_WALL_PER_CPU = 50
"""The process's own limit counts CPU time; a busy machine may take this many times longer."""


def read_template(path: Path) -> str:
    """Read a template.

    Raises:
        DataError: It cannot be read, or is too long.
    """
    try:
        return read_text(path, MOST_TEMPLATE_BYTES)
    except (OSError, ValueError) as error:
        raise DataError(
            "the chat template cannot be read", where=str(path), value=str(error),
            allowed=f"UTF-8 text of at most {MOST_TEMPLATE_BYTES} bytes",
            fix="check --chat-template",
        ) from error  # fmt: skip


class ChatTemplate:
    """Encodes chats; the template runs in a process that is ended when it takes too long.

    Args:
        source: The template, in the language of jinja.
        tokenizer: Of the model.
        seconds: CPU time of a chat.
        most_bytes: Longest text of a chat.
    """

    def __init__(
        self, source: str, tokenizer: Tokenizer, *, seconds: float = 0.1,
        most_bytes: int = 1_000_000,
    ) -> None:  # fmt: skip
        self._tokenizer, self._specials = tokenizer, tokenizer.special_tokens
        spelled = {id: token for token, id in self._specials.items()}
        names = {f"{r}_token": spelled.get(getattr(tokenizer, f"{r}_id"), "") for r in SPECIALS}
        self._setup: dict[str, Any] = {
            "template": source, "names": names, "seconds": seconds, "bytes": most_bytes,
        }  # fmt: skip
        # no letters, which a template might change; nobody outside can guess it
        self._mark = f"\ue000{secrets.randbelow(10**20):020}\ue000"
        self._process: Process | None = None
        self._one_at_a_time = asyncio.Lock()
        self._wall = seconds * _WALL_PER_CPU

    async def render(self, messages: Sequence[dict[str, str]]) -> str:
        """Return a chat as text up to where the assistant's answer begins, for :meth:`ids`.

        Special tokens that messages spell out are marked: they are text.

        Args:
            messages: Each with role and content, perhaps with a name.

        Raises:
            DataError: The template refuses the messages, or takes too long.
        """
        guarded = [
            {name: self._guard(text) if name != "role" else text for name, text in each.items()}
            for each in messages
        ]
        async with self._one_at_a_time:
            answer = await self._ask({"messages": guarded})
        if "error" in answer:
            raise DataError(
                "the chat template refuses the messages", where="messages",
                value=answer["error"].replace(self._mark, ""),
                allowed="messages that the template takes",
            )  # fmt: skip
        text: str = answer["text"]
        return text

    async def start(self) -> None:
        """Start the process, so that the first chat need not wait.

        Raises:
            DataError: The template is not valid.
        """
        if self._process is not None:
            return
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "open_mythos.inference.server.chat_worker",
            stdin=PIPE, stdout=PIPE, limit=8 * self._setup["bytes"] + (1 << 16),
            start_new_session=True,
        )  # fmt: skip
        answer = await self._exchange(self._setup, _START_SECONDS)
        if "error" in answer:
            await self.close()
            raise DataError(
                "the chat template is not valid", where="chat template", value=answer["error"],
                allowed="a Jinja template",
                fix="check --chat-template",
            )  # fmt: skip

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()  # closes its pipes

    async def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            await self.start()
            return await self._exchange(question, self._wall)
        except EnvironmentError_:
            await self.close()
            return {"error": "rendering takes too long"}
        except BaseException:  # cancelled: the answer to this question must not meet the next
            await self.close()
            raise

    async def _exchange(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send a line and return the next one.

        Raises:
            EnvironmentError_: The process has ended, or does not answer in time.
        """
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        line = b""
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(seconds):
                process.stdin.write(json.dumps(message).encode() + b"\n")
                await process.stdin.drain()
                line = await process.stdout.readline()
        if not line:
            raise EnvironmentError_(
                "the process of the chat template has ended", where="chat template",
                value=f"no answer in {seconds} s", allowed="an answer",
            )  # fmt: skip
        found: dict[str, Any] = json.loads(line)
        return found

    def _guard(self, text: str) -> str:
        """Put the mark into each special token of ``text``, and where one might arise at an end."""
        for token in self._specials:
            text = text.replace(token, token[0] + self._mark + token[1:])
        inner = text.strip()
        is_inside = bool(inner) and any(inner in token for token in self._specials)
        if is_inside or any(inner.startswith(end) for end in self._parts(ends=True)):
            text = text.replace(inner, self._mark + inner, 1)
        if any(inner.endswith(start) for start in self._parts(ends=False)):
            length = len(text.rstrip())
            text = text[:length] + self._mark + text[length:]
        return text

    def _parts(self, ends: bool) -> Iterable[str]:
        """Yield all proper ends, or all proper starts, of special tokens."""
        for token in self._specials:
            for n in range(1, len(token)):
                yield token[n:] if ends else token[:n]

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a rendered chat.

        Raises:
            DataError: The tokenizer refuses the text.
        """
        ids: list[int] = []
        for part in self._divide(text):
            ids += [part] if isinstance(part, int) else self._tokenizer.encode(part)
        return ids

    def n_bytes(self, text: str) -> int:
        """Return the bytes of a rendered chat besides its special tokens."""
        parts = self._divide(text)
        # a lone surrogate is an error of the tokenizer's
        return sum(len(x.encode(errors="replace")) for x in parts if isinstance(x, str))

    def _divide(self, text: str) -> Iterator[int | str]:
        """Yield ids of special tokens, and the plain text between them."""
        ordered = sorted(self._specials, key=len, reverse=True)
        for part in re.split(f"({'|'.join(map(re.escape, ordered))})", text):
            if part in self._specials:
                yield self._specials[part]
            elif plain := part.replace(self._mark, ""):
                yield plain
