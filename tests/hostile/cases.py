"""One case: a hostile file, a command in a process of its own, and what it must not do."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from experiments.__main__ import main as experiments
from open_mythos.cli import main
from tests.hostile.base import FILES, File, copied
from tests.hostile.kinds import NAMES, fitting

MOST_BYTES = 2 << 30
"""Most memory of a command, resident."""
MOST_SECONDS = 60
MOST_WRITTEN = 1 << 30
"""Longest file that a command may write."""
PROMISED = {0, 1, 2, 3, 4}
"""Exit codes of the command line; 5 is an error that nobody foresaw."""


@dataclass
class Result:
    """What a command did with a hostile file."""

    file: str
    hostility: str
    command: str
    code: int
    seconds: float
    mib: float
    trouble: str

    def row(self) -> dict[str, object]:
        """Return it as JSON."""
        return asdict(self)


def cases() -> Iterator[tuple[File, str, str]]:
    """Yield every (file, hostility, command)."""
    for file in FILES:
        for name in fitting(file.kind):
            for command in file.commands:
                yield file, name, command


def some(every: int) -> list[tuple[File, str, str]]:
    """Return a part of the cases: each hostility at least once."""
    kept, seen = [], set()
    for i, case in enumerate(cases()):
        if i % every == 0 or case[1] not in seen:
            seen.add(case[1])
            kept.append(case)
    return kept


def run_case(good: Path, work: Path, file: File, hostility: str, command: str) -> Result:
    """Make the file hostile in a copy of ``good`` inside ``work``, and run the command there."""
    outside, canary = work / "outside", work / "canary"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    inside = copied(good, work / "inside")
    NAMES[hostility][1](inside / file.path, canary)
    start = time.monotonic()
    code, mib, late = _watched(inside, command, work / "said")
    seconds = time.monotonic() - start
    said = (work / "said").read_text(encoding="utf-8", errors="replace")
    troubles = [
        "runs code" * canary.exists(),
        "writes outside" * (_tree(outside) != {"precious": "kept"}),
        f"not at its end after {MOST_SECONDS} s" * late,
        f"takes {mib:.0f} MiB" * (mib > MOST_BYTES >> 20),
        f"exit code {code}: {said[-500:]}" * (code not in PROMISED and not late),
        f"no typed message: {said[-500:]}" * (code not in (0, 1) and "to do:" not in said),
        "a traceback" * ("Traceback" in said),
        "steers the terminal" * ("\x1b]" in said or "\x07" in said),
        f"left beside: {sorted(_names(work))}" * (_names(work) != {"inside", "outside", "said"}),
    ]
    trouble = "; ".join(filter(None, troubles))
    shutil.rmtree(work)
    return Result(file.path, hostility, command, code, round(seconds, 2), round(mib), trouble)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _tree(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def _watched(inside: Path, command: str, said: Path) -> tuple[int, float, bool]:
    """Run the command in a forked child; return exit code, peak MiB, whether it came to no end."""
    begun = _resident(os.getpid())
    child = os.fork()
    if child == 0:
        _become(inside, command, said)
    peak, late, start = 0.0, False, time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), peak, late
        peak = max(peak, _resident(child) - begun)
        late = late or time.monotonic() - start > MOST_SECONDS
        if late or peak > MOST_BYTES >> 20:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)


def _become(inside: Path, command: str, said: Path) -> None:
    """Run the command in this process, and end it."""
    code = 99
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_WRITTEN, MOST_WRITTEN))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        os.chdir(inside)
        out = os.open(said, os.O_WRONLY | os.O_CREAT, 0o600)
        for stream in (1, 2):
            os.dup2(out, stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        name, *words = command.split()
        code = experiments(words) if name == "experiments" else main([name, *words])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 98
    except BaseException:
        traceback.print_exc()
    finally:
        for each in (sys.stdout, sys.stderr):
            each.flush()
        os._exit(code)


def _resident(process: int) -> float:
    """Return MiB of anonymous memory: files that are mapped take none of it."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0
