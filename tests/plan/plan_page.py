"""Generate the blocks of docs/plan.md between ``<!-- output: NAME -->`` and ``<!-- end -->``.

Tests compare them; ``python tests/plan/plan_page.py`` rewrites them.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path

from open_mythos.cli.plan import plan
from open_mythos.errors import MythosError
from open_mythos.plan import DoesNotFitError, Job, gpu, make_plan
from open_mythos.variants import variant

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "plan.md"
RESULTS = ROOT / "benchmarks" / "results" / "plan_memory.json"
SHOWN_ERRORS = 10
CHOSEN = (
    ("nano", 1, "h100"), ("tiny", 1, "h100"), ("small", 8, "h100"), ("1b", 8, "h100"),
    ("3b", 64, "h100"), ("7b", 64, "h100"), ("10b", 64, "h100"), ("10b", 64, "h200"),
    ("50b", 512, "h100"), ("50b", 512, "b200"), ("100b", 1024, "b200"), ("500b", 2048, "b200"),
    ("1t", 4096, "b200"),
)  # fmt: skip
"""Variants with a plausible number and type of GPUs."""
_BLOCK = re.compile(r"(<!-- output: ([^\n]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def printed(model: str, **options: object) -> str:
    """Return the output of the command, or its error message."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            plan(model, **options)
        except MythosError as error:
            print(f"open-mythos: {error}")
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip() + "\n"


def command_output(command: str) -> str:
    """Return the block of ``open-mythos plan COMMAND``."""
    model, *words = command.split()
    options = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2])}  # noqa: B905
    given: dict = options | {"gpus": int(options["gpus"])}
    return f"```text\n$ open-mythos plan {command}\n{printed(model, **given)}```\n"


def variants_table() -> str:
    """Return a table with a row per entry of :data:`CHOSEN`."""
    head = "| variant | GPUs | layout | loops | a GPU | days | cost |"
    return "\n".join([head, "|---|---|---|---|---:|---:|---:|", *map(_line, CHOSEN)]) + "\n"


def _line(chosen: tuple[str, int, str]) -> str:
    name, gpus, gpu_name = chosen
    cfg = variant(name)
    loops = cfg.max_loop_iters
    job = Job(cfg, context=min(cfg.max_seq_len, 8192), n_loops=loops, max_loops=loops)
    start = f"| {name} | {gpus:,} {gpu(gpu_name).name} "
    try:
        made = make_plan(job, gpu(gpu_name), gpus, 20.0 * job.counts.parameters)
    except DoesNotFitError as error:
        least = error.least
        most = max(least.parts, key=lambda part: least.parts[part])
        return (
            start + f"| does not fit: {least.total / 1e9:,.0f} GB, "
            f"{least.parts[most] / 1e9:,.0f} of them {most}; {error.fix} | | | | |"
        )
    kept = "recomputed" if made.layout.checkpoint_loops else "kept"
    batch = f"{made.layout.micro_batches} x {made.layout.micro_batch}"
    days = _span("< 0.1" if d < 0.1 else f"{d:,.1f}" for d in made.days)
    cost = _span("< $10" if c < 10 else f"${c:,.0f}" for c in made.cost)
    return (
        start + f"| {made.layout.name}; {batch} sequences | {kept} "
        f"| {made.memory.total / 1e9:.1f} GB | {days} | {cost} |"
    )


def _span(bounds: Iterable[str]) -> str:
    return " - ".join(dict.fromkeys(bounds))


def check_table() -> str:
    """Return the table of the largest recorded errors."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows, worst = sorted(found["rows"], key=lambda row: -abs(row["error"])), found["worst"]
    lines = [
        f"The worst error of {len(rows)} cases is {worst['error']:.2%}; of what a step adds to "
        f"weights and optimizer state, {worst['step_error']:.2%} (PyTorch "
        f"{found['machine']['torch']}, {found['machine']['date']}). The {SHOWN_ERRORS} largest:",
        "",
        "| training step | planned, kB | measured, kB | error | without weights and state |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {row['name']} | {row['planned'] / 1e3:,.0f} | {row['measured'] / 1e3:,.0f} "
            f"| {row['error']:+.2%} | {row['step_error']:+.2%} |"
            for row in rows[:SHOWN_ERRORS]
        ),
    ]
    return "\n".join(lines) + "\n"


def output(what: str) -> str:
    """Return the new content of block ``what``."""
    made = {"variants": variants_table, "check": check_table}
    return made[what]() if what in made else command_output(what)


def blocks(text: str) -> list[str]:
    """Return the names of the blocks in a page."""
    return [match[2] for match in _BLOCK.finditer(text)]


def block(text: str, what: str) -> str:
    """Return block ``what`` of a page."""
    return next(m[0] for m in _BLOCK.finditer(text) if m[2] == what)


def remade(text: str) -> str:
    """Return the page with every block regenerated."""
    return _BLOCK.sub(lambda m: m[1] + output(m[2]) + m[3], text)


if __name__ == "__main__":
    PAGE.write_text(remade(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
