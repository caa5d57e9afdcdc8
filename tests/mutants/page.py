"""The page of the last run of all mutants."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from mutants.runner import Result

HEAD = """# Mutants

A mutant is a one-place change of the code that makes a promise false. For each of them the table
names the tests that must fail then; a survivor is a promise that no test holds. `make mutants`
runs all of them in a copy of the project, one fork of a warm process each, and writes this page.
Without any change, the same tests pass. The table is in `tests/mutants/table/`; a quick test of
`make test` checks that the text of every mutant still occurs exactly once in its file, and that
this page is about mutants of the table.

"""


def page(results: Sequence[Result], in_table: int) -> str:
    """Return the page in Markdown; ``in_table`` mutants could have been run."""
    killed = sum(each.verdict == "killed" for each in results)
    text = f"{HEAD}**{killed} of {len(results)} killed**"
    if len(results) < in_table:
        text += f"; the other {in_table - len(results)} mutants of the table were not in that run"
    text += ".\n\n"
    text += "| area | mutants | killed |\n|---|---:|---:|\n"
    areas = [(area, list(own)) for area, own in groupby(results, lambda each: each.area)]
    for area, own in areas:
        text += f"| {area} | {len(own)} | {sum(e.verdict == 'killed' for e in own)} |\n"
    for area, own in areas:
        text += f"\n## {area.capitalize()}\n\n"
        text += "| what is wrong | in | tests | verdict |\n|---|---|---|---|\n"
        for each in own:
            tests = ", ".join(f"`{test.removeprefix('tests/')}`" for test in each.tests)
            text += f"| {each.name} | `{each.place}` | {tests} | {each.verdict} |\n"
    return text
