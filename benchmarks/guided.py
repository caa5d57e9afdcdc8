"""``python -m benchmarks.guided``: what a JSON schema costs for every token of a row."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

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


def main() -> None:
    """Print a table."""
    table = Table("tokens", "median, us", "mean, us", "p99, us")
    for tokenizer in tokenizers():
        spent = sorted(microseconds(tokenizer))
        values = statistics.median(spent), statistics.mean(spent), spent[len(spent) * 99 // 100]
        table.add_row(str(len(tokenizer)), *(f"{value:.0f}" for value in values))
    Console().print(table)


if __name__ == "__main__":
    main()
