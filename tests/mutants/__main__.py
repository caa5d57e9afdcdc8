"""``make mutants``: run the table, or the mutants whose names hold one of some words.

PYTHONPATH=.:tests python -m mutants [WORD ...] [--json FILE] [--page docs/mutants.md]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mutants.page import page
from mutants.runner import Result, copy_of_project, preload, run, unchanged
from mutants.table import mutants

LEAST_KILLED = 0.95


def main(words: Sequence[str] | None = None) -> int:
    """Run mutants; return 1 if too few are killed, or if the tests fail without any change."""
    parser = argparse.ArgumentParser(prog="python -m mutants", description=__doc__)
    parser.add_argument("words", nargs="*", help="part of a mutant's name or area")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--page", type=Path, help="page for the results")
    parser.add_argument("--limit", type=float, default=120, help="seconds of a mutant's tests")
    options = parser.parse_args(words)
    chosen = [
        each for each in mutants()
        if not options.words or any(w in f"{each.area} {each.name}" for w in options.words)
    ]  # fmt: skip
    preload()
    results: list[Result] = []
    with copy_of_project() as copy:
        state = unchanged(copy, chosen, 30 * options.limit)
        if state != "passed":
            print(f"the tests of the table without any change: {state}", file=sys.stderr)
            print((copy.parent / "log").read_text()[-4000:], file=sys.stderr)
            return 1
        for each in run(copy, chosen, options.limit):
            results.append(each)
            print(f"{each.verdict:9}{each.seconds:6.1f} s  {each.area}: {each.name}", flush=True)
            if each.verdict == "error":
                print((copy.parent / "log").read_text()[-1500:], file=sys.stderr)
    counts = Counter(each.verdict for each in results)
    print(f"{counts['killed']} of {len(results)} killed; {dict(counts)}")
    if options.json is not None:
        records = [each.to_json() for each in results]
        options.json.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    if options.page is not None:
        options.page.write_text(page(results, len(mutants())), encoding="utf-8")
    return int(counts["killed"] < LEAST_KILLED * len(results) or not results)


if __name__ == "__main__":
    sys.exit(main())
