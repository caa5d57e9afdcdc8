"""``python -m benchmarks.guided``: what a JSON schema costs: to compile, and for every token."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from open_mythos.inference.guided import Guides
from open_mythos.inference.request import Request
from open_mythos.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer

WORD = {"type": "string", "maxLength": 12}
SCHEMA = {
    "type": "array", "minItems": 3,
    "items": {
        "type": "object", "required": ["name", "tags", "size"], "additionalProperties": False,
        "properties": {
            "name": WORD, "size": {"type": "integer"}, "kind": {"enum": ["a", "b", None]},
            "tags": {"type": "array", "items": WORD, "maxItems": 3},
        },
    },
}  # fmt: skip
TEXTS, TOKENS = 20, 120


def tokenizers() -> Iterator[Tokenizer]:
    """Yield tokenizers of growing vocabularies, trained on this repository's own text."""
    root = Path(__file__).parents[1]
    texts = [path.read_text(encoding="utf-8") for path in sorted(root.rglob("*.py"))]
    yield ByteTokenizer()
    for size in (2000, 8000, 32000):
        yield BPETokenizer.train(texts, size)


def microseconds(tokenizer: Tokenizer) -> list[float]:
    """Follow random texts; return the time of every token."""
    guides = Guides(tokenizer, tokenizer.vocab_size, follows_rows=True)
    draw, spent = random.Random(0), []
    for i in range(TEXTS):
        request = Request(str(i), (1,), TOKENS, ends=(tokenizer.eos_id,), schema=json.dumps(SCHEMA))
        guide = guides.make(request)
        assert guide is not None
        for _ in range(TOKENS):
            allowed = [int(x) for x in np.flatnonzero(guide.allowed_V) if x != tokenizer.eos_id]
            if not allowed:
                break  # the text is complete
            token = draw.choice(allowed)
            begin = time.perf_counter()
            guide.take(token)
            spent.append(1e6 * (time.perf_counter() - begin))
    return spent


def compile_milliseconds(tokenizer: Tokenizer) -> Iterator[tuple[str, int, float]]:
    """Yield what large schemas are, their bytes, and the time to compile one."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=10)) for _ in range(4500)]
    large: dict[str, Any] = {
        "the small one": SCHEMA,
        "choice of texts": {"enum": words},
        "object of texts": {"type": "object", "properties": dict.fromkeys(words[:1500], WORD)},
        "choice of objects": {"anyOf": [
            {"type": "object", "properties": {word: {"type": "integer", "maximum": i}}}
            for i, word in enumerate(words[:800])
        ]},
    }  # fmt: skip
    for name, schema in large.items():
        text = json.dumps(schema)
        guides = Guides(tokenizer, tokenizer.vocab_size, follows_rows=True)
        begin = time.perf_counter()
        guides.make(Request("a", (1,), 1, ends=(tokenizer.eos_id,), schema=text))
        yield name, len(text), 1e3 * (time.perf_counter() - begin)


def main() -> None:
    """Print two tables."""
    table = Table("tokens", "median, us", "mean, us", "p99, us")
    for tokenizer in tokenizers():
        spent = sorted(microseconds(tokenizer))
        values = statistics.median(spent), statistics.mean(spent), spent[len(spent) * 99 // 100]
        table.add_row(str(len(tokenizer)), *(f"{value:.0f}" for value in values))
    Console().print(table)
    table = Table("schema", "bytes", "compile, ms")
    for name, n_bytes, spent_ms in compile_milliseconds(ByteTokenizer()):
        table.add_row(name, str(n_bytes), f"{spent_ms:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
