"""Prompts of models that follow chains of relations: names instead of text.

A file ``task.json`` beside the model names the task, {"task": "permhop", "entities": 16,
"relations": 8, "seed": 0}. Its tokens print as e0 .. e15 and r0 .. r7.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from open_mythos.data import PermHop
from open_mythos.errors import ConfigError, DataError

_NAME = re.compile(r"([er])(0|[1-9]\d*)")
_KEYS = ("entities", "relations", "seed")


@dataclass(frozen=True)
class Chains:
    """The names of a chain task's tokens, and where its chains lead."""

    task: PermHop

    def encode(self, prompt: str) -> list[int]:
        """The ids of names such as "e3 r1 r4": an entity, its relations, then perhaps another.

        Raises:
            ConfigError: A word is no name of this task, or the first is not an entity.
        """
        words = prompt.split()
        ids = [self._id(word) for word in words]
        if not ids or ids[0] >= self.task.entities:
            raise ConfigError(
                "a chain begins with an entity", where="prompt", value=prompt,
                allowed="an entity and then relations, such as: e0 r0 r1", fix=self._names(),
            )  # fmt: skip
        return ids

    def name(self, token: int) -> str:
        """The name of a token; ``<id>`` where the vocabulary is larger than the task's."""
        if token < self.task.entities:
            return f"e{token}"
        if token < self.task.vocab_size:
            return f"r{token - self.task.entities}"
        return f"<{token}>"

    def reached(self, ids: list[int]) -> list[tuple[int, int | None]]:
        """At each token the hops since its chain began, and the entity reached; none at 0 hops."""
        hops, entity, found = 0, 0, list[tuple[int, int | None]]()
        for token in ids:
            if token < self.task.entities:
                hops, entity = 0, token
                found.append((0, None))
            else:
                relation = np.array([[token - self.task.entities]])
                hops, entity = hops + 1, int(self.task.answers(np.array([entity]), relation)[0, 0])
                found.append((hops, entity))
        return found

    def _id(self, word: str) -> int:
        match = _NAME.fullmatch(word)
        kinds = {"e": (0, self.task.entities), "r": (self.task.entities, self.task.relations)}
        if match:
            first, count = kinds[match[1]]
            if int(match[2]) < count:
                return first + int(match[2])
        raise ConfigError(
            "not a name of this task", where="prompt", value=word, allowed=self._names(),
            fix="separate names by spaces: e3 r1 r4",
        )  # fmt: skip

    def _names(self) -> str:
        return f"e0 .. e{self.task.entities - 1}, r0 .. r{self.task.relations - 1}"


def read_chains(path: Path) -> Chains:
    """The task that ``task.json`` describes.

    Raises:
        DataError: The file is not JSON, or names another task.
    """
    allowed = '{"task": "permhop", "entities": N, "relations": R, "seed": S}'
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["task"] == "permhop":
            return Chains(PermHop(**{key: values[key] for key in _KEYS}))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            "not the description of a task", where=str(path), value=str(error), allowed=allowed
        ) from error
    raise DataError("an unknown task", where=str(path), value=values["task"], allowed=allowed)
