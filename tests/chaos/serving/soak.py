"""Half an hour of mixed load: memory, books, errors, and a canary (``make soak``).

One line of JSON per minute, and a summary at the end; the exit code is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from statistics import linear_regression
from typing import Any

from chaos.serving.load import Tally, closed_loop, poisson, quantile
from chaos.serving.server import Server, make_model, serving

LOAD, DROPPED = 0.8, 0.1
BURST, BURST_SECONDS, BURST_EVERY = 10.0, 10.0, 5
"""Times the capacity, how long, and every how many minutes."""
SETTLED = 3
"""Minutes after which memory must not grow."""
MOST_BYTES_PER_HOUR = 60e6
ALLOWED = {"200", "429", "dropped"}
_CAPACITY_SECONDS, _CLIENTS = 20.0, 24


async def soak(server: Server, draw: Random, minutes: int, seconds: float = 60.0) -> dict[str, Any]:
    """Run ``minutes`` minutes of ``seconds`` each, and return the summary."""
    before = await asyncio.to_thread(server.canary)
    idle = Tally()
    measured = min(_CAPACITY_SECONDS, seconds)
    idle = await closed_loop(server.port, draw, _CLIENTS, measured)
    capacity = idle.statuses["200"] / measured
    rows: list[dict[str, Any]] = []
    for minute in range(1, minutes + 1):
        begin = time.monotonic()
        is_burst = minute % BURST_EVERY == 0
        burst = min(BURST_SECONDS, seconds / 2) if is_burst else 0.0
        tally = await poisson(server.port, draw, LOAD * capacity, seconds - burst, DROPPED)
        extra = await poisson(server.port, draw, BURST * capacity, burst) if burst else Tally()
        same = await asyncio.to_thread(server.canary) == before
        rows.append(_row(server, minute, tally, extra, same, time.monotonic() - begin))
        print(json.dumps(rows[-1]), flush=True)
    await asyncio.to_thread(server.check_books)
    return _summary(rows, capacity, server)


def _row(
    server: Server, minute: int, tally: Tally, burst: Tally, same: bool, seconds: float
) -> dict[str, Any]:
    held = server.held()
    return {
        "minute": minute, "seconds": round(seconds, 1), "statuses": dict(tally.statuses),
        "burst": dict(burst.statuses),
        "tokens_per_second": round((tally.tokens + burst.tokens) / seconds),
        "first_ms": [round(1e3 * quantile(tally.accepted_seconds, q)) for q in (0.5, 0.99)],
        "refused_ms": [round(1e3 * quantile(burst.refused_seconds, q)) for q in (0.5, 0.99)],
        "without_retry": tally.without_retry + burst.without_retry, "canary": same,
        "mb": round(held.bytes / 1e6, 1), "files": held.files, "threads": held.threads,
        "tasks": held.tasks,
    }  # fmt: skip


def _summary(rows: list[dict[str, Any]], capacity: float, server: Server) -> dict[str, Any]:
    settled = [row for row in rows if row["minute"] > SETTLED]
    slope = 0.0
    if len(settled) > 1:
        hours = [row["minute"] / 60 for row in settled]
        slope = linear_regression(hours, [1e6 * row["mb"] for row in settled]).slope
    totals: dict[str, int] = {}
    for row in rows:
        for counts in (row["statuses"], row["burst"]):
            for name, count in counts.items():
                totals[name] = totals.get(name, 0) + count
    wrong = [
        *(f"status {name}" for name in totals if name not in ALLOWED),
        *(f"canary changed, minute {row['minute']}" for row in rows if not row["canary"]),
        *(["429 without Retry-After"] if any(row["without_retry"] for row in rows) else []),
        *([f"memory grows by {slope / 1e6:.0f} MB/h"] if slope > MOST_BYTES_PER_HOUR else []),
    ]
    return {
        "minutes": len(rows), "capacity_per_second": round(capacity, 1), "totals": totals,
        "mb_first": rows[0]["mb"], "mb_last": rows[-1]["mb"],
        "mb_per_hour": round(slope / 1e6, 1), "ledger_violations": 0,
        "engine_starts": server.text().count("started again"), "wrong": wrong,
    }  # fmt: skip


def main() -> int:
    """Run; return the exit code."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--minutes", type=int, default=30, help="how long")
    parser.add_argument("--seed", type=int, default=0, help="of the requests")
    parser.add_argument("--out", type=Path, default=Path("soak.json"), help="of the summary")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        with serving(make_model(place), place / "server") as server:
            found = asyncio.run(soak(server, Random(options.seed), options.minutes))
    options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found), flush=True)
    return int(bool(found["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
