"""Every command of the command line, in an order in which each finds what it reads."""

from __future__ import annotations

from typing import NamedTuple

SMALL = "--variant nano --train.steps 2 --train.warmup_steps 1 --train.seq_len 32"
TRAIN = f"train {SMALL} --train.global_batch 2 --quiet"


class Command(NamedTuple):
    """A command line without the program, its exit code and a text that it prints."""

    words: str
    code: int = 0
    prints: str = ""


SHORT = (
    Command("", prints="usage: open-mythos COMMAND"),
    Command("--version"),
    Command("info nano", prints="parameters"),
    Command("data prepare texts shards --quiet --val-fraction 0.3", prints="tokens"),
    Command(f"{TRAIN} --data.path shards --train.out_dir run"),
    Command("generate run ab --max-new-tokens 4 --quiet"),
)
"""What every supported Python and the lower bounds of the dependencies must run."""

ALL = (
    *SHORT,
    Command("plan nano --gpus 1", prints="parameters"),
    Command("info run", prints="parameters"),
    Command("train --dry-run --variant nano --data.path shards"),
    Command("evaluate run --windows 2 --depths [1,2] --quiet --out rows.json", prints="bits per"),
    Command("evaluate run --windows 2 --exit change:0.5 --n-loops 2 --quiet", prints="loops"),
    Command("train gate run --steps 2 --positions 64 --out gated --quiet"),
    Command("generate run ab --max-new-tokens 4 --quiet --exit kl"),
    Command("trace run abc --out trace.html", prints="trace.html"),
    Command("report run", prints="report.html"),
    Command("export run --out exported", prints="exported"),
    Command("train --recipe debug_cpu --source texts --train.steps 2 --train.warmup_steps 1 "
            "--train.out_dir recipe --quiet"),
    Command("no-such-command", code=2, prints="no such command"),
    Command("info nowhere", code=2, prints="to do:"),
    Command("generate nowhere x", code=3, prints="to do:"),
)  # fmt: skip
"""What a base install must run."""

MISSING = (
    Command("serve run --port 0", code=4, prints="open-mythos[serve]"),
    Command("retrofit run out", code=4, prints="open-mythos[hf]"),
    Command("evaluate run --tasks arc_easy", code=4, prints="open-mythos[eval]"),
    Command("data prepare tables out", code=4, prints="open-mythos[data]"),
    Command(f"{TRAIN} --data.path shards --train.out_dir w --watch.loggers [wandb]", code=4,
            prints="pip install wandb"),
)  # fmt: skip
"""What needs an extra, which the message names."""
