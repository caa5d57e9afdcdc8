"""The parts of docs/plan.md that the code prints.

The page holds each of them between ``<!-- output: WHAT -->`` and ``<!-- end -->``. The tests
compare; this script rewrites them:

    python tests/plan/plan_page.py
"""

from __future__ import annotations

import contextlib
import io
import json
import re
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
"""Variants, and GPUs such as one would take for them."""
_BLOCK = re.compile(r"(<!-- output: ([^\n]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def printed(model: str, **options: object) -> str:
    """What the command prints; an error as the command line shows it."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            plan(model, **options)
        except MythosError as error:
            print(f"open-mythos: {error}")
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip() + "\n"


def command_output(command: str) -> str:
    """The output of ``open-mythos plan COMMAND`` as a block."""
    model, *words = command.split()
    options = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2])}  # noqa: B905
    given: dict = options | {"gpus": int(options["gpus"])}
    return f"```text\n$ open-mythos plan {command}\n{printed(model, **given)}```\n"


def variants_table() -> str:
    """A line for each of :data:`CHOSEN`."""
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
    days = _span(*("< 0.1" if d < 0.1 else f"{d:,.1f}" for d in made.days))
    cost = _span(*("< $10" if c < 10 else f"${c:,.0f}" for c in made.cost))
    return (
        start + f"| {made.layout.name}; {batch} sequences | {kept} "
        f"| {made.memory.total / 1e9:.1f} GB | {days} | {cost} |"
    )


def _span(best: str, worst: str) -> str:
    return best if best == worst else f"{best} - {worst}"


def check_table() -> str:
    """The largest errors of the recorded benchmark."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = sorted(found["rows"], key=lambda row: -abs(row["error"]))
    worst = found["worst"]
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
    """The block called ``what``."""
    made = {"variants": variants_table, "check": check_table}
    return made[what]() if what in made else command_output(what)


def blocks(text: str) -> list[str]:
    """The names of the blocks in a page."""
    return [match[2] for match in _BLOCK.finditer(text)]


def block(text: str, what: str) -> str:
    """What a page holds in the block called ``what``."""
    return next(m[0] for m in _BLOCK.finditer(text) if m[2] == what)


def remade(text: str) -> str:
    """Return the page with every block regenerated."""
    return _BLOCK.sub(lambda m: m[1] + output(m[2]) + m[3], text)


if __name__ == "__main__":
    PAGE.write_text(remade(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
