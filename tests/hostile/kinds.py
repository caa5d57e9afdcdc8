"""The kinds of hostility: each makes a good file hostile. A new one is one more function."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

ALL = frozenset({"json", "yaml", "jsonl", "text", "tensors", "binary", "gz", "parquet", "template"})
TEXTS = frozenset({"json", "yaml", "jsonl", "text", "template"})
OBJECTS = frozenset({"json", "yaml", "jsonl"})
NAMES: dict[str, tuple[frozenset[str], Callable[[Path, Path], None]]] = {}
"""Name -> the kinds of files that it fits, and what it does to (file, canary)."""

ESCAPES = "\x1b]0;stolen\x07\x1b[2J\r<script>alert(1)</script>\u202e\u2028[/][bold]"
LEAVES: dict[str, Any] = {
    "nan": float("nan"), "infinity": float("inf"), "huge integer": 10**400,
    "large integer": 2**63 - 1, "negative": -1, "null": None, "true": True, "nested": [[[]]],
    "mapping": {"a": {"b": 1}}, "parent path": "../../outside/precious",
    "absolute path": "/etc/passwd", "escapes": ESCAPES, "long name": "n" * 100_000, "empty": "",
    "template": "{{ ''.__class__.__mro__[1].__subclasses__() }}", "zero byte": "a\0b",
}  # fmt: skip
"""What takes the place of the values of an object, one after another."""


def hostility(name: str, fits: frozenset[str]) -> Callable[..., Any]:
    """Enter a function (file, canary) into the table."""

    def enter(function: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        NAMES[name] = fits, function
        return function

    return enter


class _Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.canary}'",)


@hostility("pickle", ALL)
def _pickle(file: Path, canary: Path) -> None:
    file.write_bytes(pickle.dumps(_Runs(canary)))


@hostility("no bytes", ALL)
def _empty(file: Path, canary: Path) -> None:
    file.write_bytes(b"")


@hostility("truncated", ALL)
def _truncated(file: Path, canary: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])


@hostility("noise", ALL)
def _noise(file: Path, canary: Path) -> None:
    file.write_bytes(bytes(range(128, 256)) * 40)


@hostility("sparse, 6 GiB", ALL)
def _sparse(file: Path, canary: Path) -> None:
    os.truncate(file, 6 << 30)


@hostility("link to a file outside", ALL)
def _link(file: Path, canary: Path) -> None:
    file.unlink()
    file.symlink_to(canary.parent / "outside" / "precious")


@hostility("link to a device", ALL)
def _device(file: Path, canary: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


@hostility("pipe", ALL)
def _pipe(file: Path, canary: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@hostility("folder", ALL)
def _folder(file: Path, canary: Path) -> None:
    file.unlink()
    file.mkdir()


@hostility("not UTF-8", TEXTS)
def _latin(file: Path, canary: Path) -> None:
    file.write_bytes(file.read_bytes() + "é".encode("latin-1"))


@hostility("UTF-16", TEXTS)
def _wide(file: Path, canary: Path) -> None:
    file.write_bytes(file.read_text(encoding="utf-8").encode("utf-16"))


@hostility("deep nesting", OBJECTS)
def _deep(file: Path, canary: Path) -> None:
    file.write_text("[" * 100_000)


@hostility("one line of 300 MB", TEXTS)
def _line(file: Path, canary: Path) -> None:
    with file.open("w") as out:
        for _ in range(300):
            out.write("x" * 1_000_000)


@hostility("another root", OBJECTS)
def _root(file: Path, canary: Path) -> None:
    file.write_text("[1, 2]\n")


@hostility("unknown key", frozenset({"json", "yaml"}))
def _key(file: Path, canary: Path) -> None:
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    _write(file, {**values, f"__class__{ESCAPES}": 1})


@hostility("YAML tag", frozenset({"yaml", "json"}))
def _tag(file: Path, canary: Path) -> None:
    file.write_text(f'a: !!python/object/apply:os.system ["touch {canary}"]\n')


@hostility("alias bomb", frozenset({"yaml"}))
def _aliases(file: Path, canary: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    file.write_text("\n".join(lines) + "\n")


@hostility("recursive alias", frozenset({"yaml"}))
def _recursive(file: Path, canary: Path) -> None:
    file.write_text("data: &a [*a]\n")


def _write(file: Path, values: Any) -> None:
    text = yaml.safe_dump(values) if file.suffix == ".yaml" else json.dumps(values)
    file.write_text(text, encoding="utf-8")


def _replaced(values: Any, leaf: Any) -> Any:
    if isinstance(values, dict):
        return {key: _replaced(each, leaf) for key, each in values.items()}
    if isinstance(values, list):
        return [_replaced(each, leaf) for each in values]
    return leaf


def _all_leaves(file: Path, canary: Path, leaf: Any) -> None:
    if file.suffix == ".jsonl":
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        file.write_text("".join(json.dumps(_replaced(row, leaf)) + "\n" for row in rows))
    else:
        _write(file, _replaced(yaml.safe_load(file.read_text(encoding="utf-8")), leaf))


for _name, _leaf in LEAVES.items():
    hostility(f"values: {_name}", OBJECTS)(partial(_all_leaves, leaf=_leaf))


@hostility("values missing", frozenset({"json", "yaml"}))
def _missing(file: Path, canary: Path) -> None:
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    _write(file, dict(list(values.items())[::2]))


def _header(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def _with_header(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    header, data = _header(file)
    text = json.dumps(change(header)).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _entries(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda header: {
        name: entry if name == "__metadata__" else {**entry, **change(entry)}
        for name, entry in header.items()
    }


HEADERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "offsets below zero": _entries(lambda e: {"data_offsets": [-8, e["data_offsets"][1]]}),
    "offsets of 2^62": _entries(lambda e: {"data_offsets": [0, 2**62]}),
    "overlapping offsets": _entries(lambda e: {"data_offsets": [0, 4]}),
    "shape of 2^62": _entries(lambda e: {"shape": [2**31, 2**31]}),
    "unknown dtype": _entries(lambda e: {"dtype": "OBJECT"}),
    "another dtype": _entries(lambda e: {"dtype": "I32"}),
    "names with escapes": lambda h: {ESCAPES + name: entry for name, entry in h.items()},
    "metadata that is code": lambda h: {"__metadata__": {"code": "__import__('os')"}, **h},
}


def _change_header(file: Path, canary: Path, change: Callable[..., Any]) -> None:
    _with_header(file, change)


for _name, _change in HEADERS.items():
    hostility(f"header: {_name}", frozenset({"tensors"}))(partial(_change_header, change=_change))


@hostility("header of 2^63 bytes", frozenset({"tensors"}))
def _long_header(file: Path, canary: Path) -> None:
    file.write_bytes(struct.pack("<Q", 2**63 - 1) + file.read_bytes()[8:])


@hostility("header of 6 GiB", frozenset({"tensors"}))
def _sparse_header(file: Path, canary: Path) -> None:
    file.write_bytes(struct.pack("<Q", 6 << 30))
    os.truncate(file, 7 << 30)


@hostility("NaN tensors", frozenset({"tensors"}))
def _nan(file: Path, canary: Path) -> None:
    header, data = _header(file)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"\xff" * len(data))


@hostility("gz bomb", frozenset({"gz", "text", "jsonl"}))
def _gz(file: Path, canary: Path) -> None:
    member = gzip.compress(bytes(1 << 24))
    file.write_bytes(member * 640)  # 10 GiB


@hostility("Parquet bomb", frozenset({"parquet"}))
def _parquet(file: Path, canary: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.array(["x" * (1 << 20)])
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 24_000, pa.int32()), text)
    pq.write_table(pa.table({"text": column}), file)


@hostility("another column type", frozenset({"parquet"}))
def _column(file: Path, canary: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": pa.array([2**62], pa.timestamp("ms"))}), file)


@hostility("template with code", frozenset({"template"}))
def _template(file: Path, canary: Path) -> None:
    classes = "''.__class__.__mro__[1].__subclasses__()"
    file.write_text(f"{{{{ {classes} }}}}{{% include '../../outside/precious' %}}")


@hostility("endless template", frozenset({"template"}))
def _endless(file: Path, canary: Path) -> None:
    file.write_text("{% for i in range(10**12) %}x{% endfor %}")


def fitting(kind: str) -> Iterator[str]:
    """Yield the names of what fits a kind of file."""
    return (name for name, (fits, _) in NAMES.items() if kind in fits)
