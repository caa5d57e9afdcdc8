"""Save and load a task next to a model trained on it.

``task.json`` describes the task. For chains, ``tokenizer/`` names its tokens e0 e1 .. and r0 r1 ..,
so that the library's commands read and print them as text.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from experiments.tasks.distances import Distances
from experiments.tasks.maze import Maze
from experiments.tasks.permhop import PermHop
from experiments.tasks.sudoku import Sudoku
from open_mythos.checks import is_int
from open_mythos.errors import ConfigError, DataError
from open_mythos.files import read_object
from open_mythos.hub.pretrained import from_pretrained, save_pretrained
from open_mythos.model.mythos import OpenMythos
from open_mythos.run_folder import TOKENIZER_FOLDER
from open_mythos.train.build import Model

TASK_FILE = "task.json"
MAX_BYTES = 1 << 16
MOST_TOKENS = 1 << 13
"""Entities and relations, cells times digits, edges or cells of a task that is read."""
SavedTask = PermHop | Sudoku | Distances | Maze
_TASKS: dict[str, type[SavedTask]] = {
    "permhop": PermHop, "sudoku": Sudoku, "distances": Distances, "maze": Maze
}  # fmt: skip


def keep(model: Model, task: SavedTask, folder: Path) -> None:
    """Save a model and its task for ``python -m experiments trace``."""
    save_pretrained(model, folder)
    save_task(task, folder)


def save_task(task: SavedTask, folder: Path) -> None:
    """Write the task to ``folder``, and the word-level tokenizer of chains."""
    if isinstance(task, PermHop):
        _save_words(task, folder)
    (name,) = (name for name, kind in _TASKS.items() if isinstance(task, kind))
    description = {"task": name, **asdict(task)}
    (folder / TASK_FILE).write_text(json.dumps(description) + "\n", encoding="utf-8")


def _save_words(task: PermHop, folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = [f"e{i}" for i in range(task.entities)] + [f"r{i}" for i in range(task.relations)]
    words = Tokenizer(models.WordLevel({name: token for token, name in enumerate(names)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    target = folder / TOKENIZER_FOLDER
    target.mkdir(parents=True, exist_ok=True)
    words.save(str(target / "tokenizer.json"))


def load_task(folder: Path) -> SavedTask:
    """Read the task that :func:`save_task` wrote to ``folder``.

    Raises:
        DataError: The file is missing or does not describe a task.
    """
    path = folder / TASK_FILE
    fix = "pass a model folder written by the demo, such as runs/demo/chains/looped"
    values = read_object(path, "no description of a task", fix, MAX_BYTES)
    try:
        kind = _TASKS[values.pop("task")]
        if not all(is_int(x) and abs(x) < 1 << 32 for x in values.values()):
            raise ValueError("not integers of at most 32 bits")
        task = kind(**values)
        if max(task.vocab_size, getattr(task, "cells", 0)) > MOST_TOKENS:
            raise ValueError(f"more than {MOST_TOKENS:,} tokens or cells")
        return task
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            "no description of a task", where=str(path), value=str(error),
            allowed='{"task": "permhop", "entities": N, "relations": R, "seed": S}, '
            '"sudoku", "distances" or "maze"',
            fix=fix,
        ) from error  # fmt: skip


def looped_model(folder: Path) -> OpenMythos:
    """Load a looped model; raise ConfigError if it is dense."""
    model = from_pretrained(folder)
    if not isinstance(model, OpenMythos):
        raise ConfigError(
            "a dense model has no loops", where="trace", value=str(folder),
            allowed="a looped model", fix="pass the folder of a looped model",
        )  # fmt: skip
    return model


def reached(task: PermHop, ids: list[int]) -> list[tuple[int, int] | None]:
    """Return (hops since the last entity, entity reached) at each relation, None at an entity.

    Raises:
        DataError: ``ids`` do not start with an entity.
    """
    if not ids or ids[0] >= task.entities:
        raise DataError(
            "a chain must start with an entity", where="prompt", value=ids[:1],
            allowed=f"e0 .. e{task.entities - 1}, then relations r0 .. r{task.relations - 1}",
            fix="write it like e3 r1 r4",
        )  # fmt: skip
    found: list[tuple[int, int] | None] = []
    hops, entity = 0, 0
    for token in ids:
        if token < task.entities:
            hops, entity = 0, token
            found.append(None)
        else:
            hops, entity = hops + 1, int(task.tables[token - task.entities, entity])
            found.append((hops, entity))
    return found
