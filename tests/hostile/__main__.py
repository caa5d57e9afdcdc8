"""Run every case; print a table of failures and of kinds, write JSON; exit 1 on a failure."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import torch

from tests.hostile.base import make, make_models
from tests.hostile.cases import cases, run_case, some


def main() -> int:
    """Run the cases; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="run a part: one case in this many")
    parser.add_argument("--only", default="", help="cases whose description holds this text")
    parser.add_argument("--out", type=Path, default=Path("hostile.json"), help="the JSON file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    out, rows = given.out.resolve(), []
    chosen = list(cases()) if given.every == 1 else some(given.every)
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        good = Path(folder) / "good"
        good.mkdir()
        os.chdir(good)
        make(good)
        make_models(good)
        for i, (file, hostility, command) in enumerate(chosen):
            if given.only not in f"{file.path} {hostility} {command}":
                continue
            work = Path(folder) / f"case-{i}"
            work.mkdir()
            row = run_case(good, work, file, hostility, command)
            rows.append(row)
            if row.trouble:
                print(f"FAILED {file.path}, {hostility}: open-mythos {command}\n  {row.trouble}",
                      flush=True)  # fmt: skip
        os.chdir(folder)
    out.write_text(json.dumps([row.row() for row in rows], indent=1) + "\n")
    _show(rows)
    return 1 if any(row.trouble for row in rows) else 0


def _show(rows: list) -> None:
    print(f"\n{'file':40}{'cases':>6}{'exit 0':>7}{'typed':>6}{'failed':>7}{'most s':>7}{'MiB':>6}")
    for name in dict.fromkeys(row.file for row in rows):
        of = [row for row in rows if row.file == name]
        count = Counter("failed" if r.trouble else "fine" if r.code == 0 else "typed" for r in of)
        print(f"{name:40}{len(of):6}{count['fine']:7}{count['typed']:6}{count['failed']:7}"
              f"{max(r.seconds for r in of):7.1f}{max(r.mib for r in of):6.0f}")  # fmt: skip
    failed = sum(bool(row.trouble) for row in rows)
    print(f"{len(rows)} cases, {failed} failed")


if __name__ == "__main__":
    raise SystemExit(main())
