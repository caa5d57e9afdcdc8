"""The fork server: everything slow is done once, then each job is a fork of this process.

Reads jobs from standard input and answers on standard output, a JSON object a line each. It has
one thread, so that a fork is safe. It leaves when its input ends, and takes the running job with
it; a job whose server was killed is killed by the kernel (on Linux).
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

BEGIN = b"b"
_told: list[int] = []


def begin() -> None:
    """Called by a job: from here on counts ``after`` with ``"from": "begin"``."""
    while _told:
        os.write(_told.pop(), BEGIN)


def main() -> None:
    """Warm up, then serve until the input ends."""
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        if "warm" in sys.argv[1:]:
            from chaos import small_run

            small_run.warm_up()
        threads = Path("/proc/self/task")
        if threads.is_dir():
            assert len(list(threads.iterdir())) == 1, "a fork of several threads is not safe"
        print(json.dumps({"ready": os.getpid()}), file=answers)
        pending = b""
        while chunk := os.read(0, 1 << 16):
            pending += chunk
            while b"\n" in pending:
                line, _, pending = pending.partition(b"\n")
                print(json.dumps(serve(json.loads(line))), file=answers)


def serve(job: dict[str, Any]) -> dict[str, Any]:
    """Fork, send the job's signal when its time has come, wait for its end."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _told.append(writing)
        run_and_exit(job)
    os.close(writing)
    limit = time.monotonic() + job["limit"]
    after, number = job.get("after"), job.get("signal", signal.SIGKILL)
    due = None if after is None or job.get("from") == "begin" else time.monotonic() + after
    sent = hung = False
    while True:
        until = limit if due is None or sent else min(due, limit)
        ready, _, _ = select.select([reading, 0], [], [], max(0.0, until - time.monotonic()))
        if reading in ready:
            said = os.read(reading, 1)
            if said == BEGIN and job.get("from") == "begin" and after is not None:
                due = time.monotonic() + after
            if said:
                continue
            break  # the other end is closed: the process is gone
        if 0 in ready:  # whoever asked has gone, or breaks the protocol: one job at a time
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            sys.exit(1)
        if time.monotonic() >= limit:
            hung = True
            os.kill(pid, signal.SIGKILL)
        elif due is not None and not sent and time.monotonic() >= due:
            sent = True
            os.kill(pid, number)
    os.close(reading)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {"code": code, "sent": sent, "hung": hung}


def run_and_exit(job: dict[str, Any]) -> None:
    """In the fork: call the job's function and leave as the command line would."""
    die_with_the_server()
    error = os.open(job["stderr"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for descriptor in (1, 2):
        os.dup2(error, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # opened now: a job may give up its rights, or fill the disk
    result = os.open(job["result"], os.O_WRONLY | os.O_CREAT, 0o666)
    from open_mythos.errors import MythosError

    code = 1
    try:
        module, _, name = job["call"].partition(":")
        value = getattr(importlib.import_module(module), name)(**job["arguments"])
        os.write(result, json.dumps(value).encode())
        code = 0
    except MythosError as failure:
        print(f"open-mythos: {failure}", file=sys.stderr)
        code = failure.exit_code
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def die_with_the_server() -> None:
    """Linux: have the kernel send SIGKILL when the parent is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    # as the module that jobs import, not as a second one of another name
    importlib.import_module("chaos.fork_server").main()
