"""Layout of a training run's folder.

    run.yaml          configuration of the run (``RunConfig``)
    metrics.jsonl     one JSON object per logged step, evaluation or event
    tokenizer/        the tokenizer
    checkpoints/      step_00000100/, ...
    data/             token shards prepared by the run
    provenance.json, retrofit.json, chat_template.jinja
                      of the model that it started from, if that has them
    report.html       output of ``open-mythos report``

This module loads no torch.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from open_mythos.checks import is_int, is_number
from open_mythos.errors import DataError, EnvironmentError_
from open_mythos.files import read_object, read_text, write_text

logger = logging.getLogger(__name__)

CONFIG_FILE = "run.yaml"
METRICS_FILE = "metrics.jsonl"
REPORT_FILE = "report.html"
TOKENIZER_FOLDER = "tokenizer"
CHECKPOINTS_FOLDER = "checkpoints"
DATA_FOLDER = "data"
LOCK_FILE = ".lock"
"""Held by the process that trains in the folder."""
STATE_FILE = "state.json"
"""Of a checkpoint: step, data position, depths, ..."""
VALIDATED_DEPTHS = "validated_depths"
"""Key of ``STATE_FILE``: the record of validated depths."""
DEPTHS_FILE = "validated_depths.json"
"""That record, beside a model that is no checkpoint: one with a trained gate, an exported one."""
AVERAGE_FILE = "average.safetensors"
"""Of a checkpoint: averaged weights, with ``optim.ema_decay``."""
GATE_FILE = "gate.json"
"""Written next to a model whose gate was trained: exit rule and training metadata."""
TEMPLATE_FILE = "chat_template.jinja"
"""Template of chats of a model that has one."""
PROVENANCE_FILE = "provenance.json"
"""Where a converted model comes from."""
RETROFIT_FILE = "retrofit.json"
"""Which dense model became this looped one, and how."""
ORIGIN_FILES = (TEMPLATE_FILE, PROVENANCE_FILE, RETROFIT_FILE)
"""What stays true of a model when it is trained further."""
MAX_CONFIG_BYTES = 1 << 20
_STEP = re.compile(r"step_(\d+)")


def write_config(folder: Path, values: dict[str, Any]) -> None:
    """Write the ``run.yaml`` of a run's folder; one that says the same keeps its comments.

    Another one that a run has not written is kept under another name.
    """
    path = folder / CONFIG_FILE
    try:
        if not path.is_symlink() and path.is_file():
            found = read_config(path)
            if found == values:
                return
            if read_text(path, MAX_CONFIG_BYTES) != _as_yaml(found):
                _keep(path)
    except (DataError, OSError, ValueError):
        _keep(path)
    write_text(path, _as_yaml(values))


def _as_yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False)


def _keep(path: Path) -> None:
    names = ("run.before.yaml", *(f"run.before-{n}.yaml" for n in range(2, 1000)))
    kept = next(place for name in names if not os.path.lexists(place := path.with_name(name)))
    try:
        path.rename(kept)
    except OSError as error:
        raise EnvironmentError_(
            "the file of the user cannot be kept", where=str(path), value=str(error),
            allowed="a writable folder", fix="move it elsewhere",
        ) from error  # fmt: skip
    logger.warning("%s is another configuration and is kept as %s", path, kept.name)


def read_config(path: Path) -> dict[str, Any]:
    """Read a ``run.yaml``, or another configuration in YAML or JSON.

    Raises:
        DataError: The file cannot be read or does not hold a mapping.
    """
    is_json = path.suffix == ".json"
    what = f"not a readable {'JSON' if is_json else 'YAML'} file"
    try:
        text = read_text(path, MAX_CONFIG_BYTES)
        values = json.loads(text, object_pairs_hook=_once) if is_json else load_yaml(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(
            what, where=str(path), value=str(error) or type(error).__name__,
            allowed=f"a text of at most {MAX_CONFIG_BYTES:,} bytes, without aliases",
            fix="correct the file",
        ) from error  # fmt: skip
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise DataError(
            "not a configuration", where=str(path), value=values,
            allowed="a mapping of names to values", fix="correct the file",
        )  # fmt: skip
    return values


def load_yaml(text: str) -> Any:
    """Return what a text in YAML holds, with decimal numbers only and without aliases.

    Raises:
        yaml.YAMLError, ValueError: It is not such a text.
    """
    return yaml.load(text, _YamlLoader)


def _once(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    """Make a mapping of pairs; raise a ValueError for a key that stands there twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"twice in one mapping: {next(k for k in keys if keys.count(k) > 1)!r}")
    return values


class _YamlLoader(yaml.SafeLoader):
    """Reads plain YAML: numbers such as 1e-6 too, which YAML 1.1 takes for text; no aliases.

    A few lines of aliases can stand for a document of any size. Numbers that YAML 1.1 takes for
    others are refused: 010 is eight there, and 1:30 ninety.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Make a mapping; reject a key that stands there twice."""
        _once([(k.value, None) for k, _ in node.value if isinstance(k, yaml.ScalarNode)])
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node: Any) -> int | float:
        """Make a number; reject one that is not written in decimals."""
        is_int = node.tag.endswith("int")
        if ":" in node.value or (is_int and re.match(r"[-+]?0\d", node.value)):
            raise yaml.YAMLError(f"{node.value} is no decimal number: quote it if it is a text")
        return self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node; reject an alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("the file holds an alias (*name)")
        return super().compose_node(parent, index)


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"),
    list("-+.0123456789"),
)
for _kind in ("int", "float"):
    _YamlLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _YamlLoader.construct_decimal)


def step_folders(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of every checkpoint in ``folder``, oldest first; [] if it is missing."""
    found = folder.iterdir() if folder.is_dir() else ()
    named = [(match, path) for path in found if (match := _STEP.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in named if path.is_dir())


def find_beside(model_folder: Path, name: str) -> Path | None:
    """Find ``name`` in a model's folder or in the run that the checkpoint belongs to."""
    folder = model_folder.resolve()
    places = (folder, folder.parent, folder.parent.parent)
    return next((place / name for place in places if (place / name).exists()), None)


def validated_range(model_folder: Path) -> tuple[int, int] | None:
    """Return the least and the most loops at which a checkpoint was validated, None if unknown."""
    record = validated_record(model_folder)
    return None if record is None or record["low"] is None else (record["low"], record["high"])


def usable_depths(validated: Sequence[int] | None, trained: int) -> tuple[int, int]:
    """Return the range of loops that need no permission: the validated one.

    Without a record it goes up to the trained depth.
    """
    low, high = validated or (1, trained)
    return low, high


def validated_record(model_folder: Path) -> dict[str, Any] | None:
    """Return the record of validated depths of a stored model, None if it has none.

    Its "low" and "high" are the validated range, None if no depth was good.

    Raises:
        DataError: It is not one.
    """
    path, record = model_folder / STATE_FILE, None
    if path.exists():
        record = read_object(path, "the checkpoint's state cannot be read").get(VALIDATED_DEPTHS)
    elif (path := model_folder / DEPTHS_FILE).exists():
        record = read_object(path, "the record of validated depths cannot be read")
    if record is None:
        return None
    if not _is_record(record):
        raise DataError(
            "not a record of validated depths", where=str(path), value=record,
            allowed="low and high (loops, or null); with rows of depth and loss, a tolerance",
            fix="write it again, or delete it",
        )  # fmt: skip
    return record


def _is_record(record: Any) -> bool:
    if not (isinstance(record, dict) and {"low", "high"} <= record.keys()):
        return False
    low, high, rows = record["low"], record["high"], record.get("rows", [])
    known = low is high is None or (is_int(low) and is_int(high) and 1 <= low <= high)
    return known and isinstance(rows, list) and all(
        is_number(record.get("tolerance")) and isinstance(row, dict) and is_int(row.get("depth"))
        and (row.get("loss", "") is None or is_number(row.get("loss")))
        for row in rows
    )  # fmt: skip


def copy_depths(model_folder: Path, target: Path) -> None:
    """Write the record of validated depths of a stored model, if it has one, beside its copy."""
    record = validated_record(model_folder)
    if record is not None:
        write_text(target / DEPTHS_FILE, json.dumps(record, indent=1) + "\n")
