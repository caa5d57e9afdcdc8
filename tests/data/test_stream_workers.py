"""Worker processes: equal windows, failures, and no process left behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import dataloader

from open_mythos.data import StreamLoader, open_corpus, stream_workers
from open_mythos.data import stream as streaming
from open_mythos.data.stream_workers import WorkerDiedError
from open_mythos.errors import DataError, EnvironmentError_, InternalError
from open_mythos.tokenizer import BPETokenizer, ByteTokenizer

TEXTS = [f"<{i}> a document that says <|eos|> and goes on for a while" for i in range(60)]
LIMIT_S = 120.0


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def corpus_file(tmp_path) -> Path:
    return write(tmp_path / "a.jsonl", [json.dumps({"text": text}) for text in TEXTS])


@pytest.fixture(autouse=True)
def _patience(monkeypatch) -> None:
    """PyTorch looks for dead workers every 5 seconds, and waits as long for what pytest keeps."""
    monkeypatch.setattr(dataloader._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    look = dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(look, "__defaults__", (0.1,))


def gone(pids: list[int]) -> bool:
    """Whether all of these processes end in time."""
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        if not any(is_running(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:  # a zombie has ended; only its parent has not looked yet
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return not Path("/proc").is_dir()


def worker_pids() -> list[int]:
    return [child.pid for child in multiprocessing.active_children()]


def test_text_is_only_text_in_a_worker_too(corpus_file) -> None:
    """A pickled tokenizer would read "<|eos|>" in a text as the end of a document."""
    tokenizer = BPETokenizer.train(TEXTS, 300)
    corpus = open_corpus(corpus_file)
    options = {"seq_len": 64, "global_batch": 3}
    with_workers = StreamLoader(corpus, tokenizer, num_workers=2, **options)
    without = StreamLoader(corpus, tokenizer, **options)
    for _ in range(20):
        assert torch.equal(next(with_workers).input_ids, next(without).input_ids)


def test_damage_is_the_same_error_with_workers(tmp_path) -> None:
    lines = [json.dumps({"text": text}) for text in TEXTS]
    corpus = open_corpus(write(tmp_path / "a.jsonl", [*lines[:50], "{damaged", *lines[50:]]))
    messages = []
    for workers in (0, 2):
        loader = StreamLoader(
            corpus, ByteTokenizer(), seq_len=64, global_batch=2, num_workers=workers
        )
        with pytest.raises(DataError, match=r"a\.jsonl, byte \d+") as caught:
            [next(loader) for _ in range(200)]
        assert caught.value.what == "the line is not JSON"
        messages.append((loader.step, str(caught.value)))
    assert messages[0] == messages[1]


def test_a_defect_in_a_worker_says_where_it_is(corpus_file, monkeypatch) -> None:
    loader = StreamLoader(
        open_corpus(corpus_file), ByteTokenizer(), seq_len=64, global_batch=2, num_workers=1
    )
    monkeypatch.setitem(loader._plan.__dict__, "units", "not units")
    with pytest.raises(InternalError, match=r"corpus\.py, line \d+, in unit_size"):
        next(loader)


@pytest.fixture
def pair(corpus_file) -> tuple[StreamLoader, StreamLoader, list[int]]:
    """Two loaders of the same windows, the first with two workers that run, and their pids."""
    before = worker_pids()
    options = {"seq_len": 64, "global_batch": 2}
    loader = StreamLoader(open_corpus(corpus_file), ByteTokenizer(), num_workers=2, **options)
    reference = StreamLoader(open_corpus(corpus_file), ByteTokenizer(), **options)
    assert torch.equal(next(loader).input_ids, next(reference).input_ids)
    return loader, reference, list(set(worker_pids()) - set(before))


def test_a_worker_that_is_killed_is_replaced(pair, caplog) -> None:
    loader, reference, workers = pair
    os.kill(workers[0], signal.SIGKILL)
    for _ in range(10):
        assert torch.equal(next(loader).input_ids, next(reference).input_ids)
    assert "a data worker ended unexpectedly" in caplog.text


def test_workers_that_keep_ending_are_an_error(corpus_file, monkeypatch) -> None:
    def died(*_: object, **__: object) -> None:
        raise WorkerDiedError("a data worker ended unexpectedly", where="num_workers")

    loader = StreamLoader(
        open_corpus(corpus_file), ByteTokenizer(), seq_len=64, global_batch=2, num_workers=1
    )
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "prefetched", died)
        with pytest.raises(EnvironmentError_, match="data worker ended unexpectedly"):
            next(loader)
    assert loader.step == 0
    assert next(loader).sample_index.tolist() == [0, 1]


def test_silent_workers_are_an_error(corpus_file, monkeypatch) -> None:
    """No worker starts in no time, so both attempts are ended."""
    monkeypatch.setattr(stream_workers, "TIMEOUT_S", 0.0)
    loader = StreamLoader(
        open_corpus(corpus_file), ByteTokenizer(), seq_len=64, global_batch=2, num_workers=1
    )
    with pytest.raises(EnvironmentError_, match="data worker ended unexpectedly"):
        next(loader)
    assert loader.step == 0


@pytest.mark.slow
def test_a_worker_that_was_stopped_is_replaced(pair, monkeypatch, caplog) -> None:
    monkeypatch.setattr(stream_workers, "TIMEOUT_S", 20.0)
    loader, reference, workers = pair
    os.kill(workers[0], signal.SIGSTOP)
    for _ in range(10):
        assert torch.equal(next(loader).input_ids, next(reference).input_ids)
    assert "gave nothing for 20 seconds" in caplog.text
    assert gone(workers[:1])


def test_closing_ends_the_workers_and_the_position_stays(pair) -> None:
    loader, reference, workers = pair
    assert len(workers) == 2
    loader.close()
    assert gone(workers)
    assert torch.equal(next(loader).input_ids, next(reference).input_ids)


def test_the_global_generator_is_left_alone(corpus_file) -> None:
    before = torch.get_rng_state()
    next(
        StreamLoader(
            open_corpus(corpus_file), ByteTokenizer(), seq_len=64, global_batch=2, num_workers=1
        )
    )
    assert torch.equal(torch.get_rng_state(), before)


PROGRAM = """
import multiprocessing, signal, sys, time
from open_mythos.data import StreamLoader, open_corpus
from open_mythos.tokenizer import ByteTokenizer

if __name__ == "__main__":
    loader = StreamLoader(
        open_corpus(sys.argv[1]), ByteTokenizer(), seq_len=64, global_batch=2, num_workers=2
    )
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
    next(loader)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    end = time.monotonic() + 600
    while len(stopped) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    for _ in range(20):  # more than was made ahead: the workers still work
        next(loader)
    print("in order", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow  # PyTorch looks for lost workers every five seconds
@pytest.mark.parametrize("end", ["killed", "done"])
def test_signals_to_the_group_let_the_trainer_end_in_order(corpus_file, end):
    """Ctrl-C as a terminal sends it, SIGTERM as launchers do: to every process."""
    program = corpus_file.parent / "program.py"
    program.write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, str(program), str(corpus_file)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(process.pid, number)
    assert process.stdout.readline() == "in order\n"
    if end == "killed":
        process.kill()
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == (0 if end == "done" else -signal.SIGKILL)
    assert gone(workers)
