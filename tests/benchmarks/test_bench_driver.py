"""The driver: deadlines, failures, what is saved, what machine it is."""

import argparse
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from benchmarks import machine, roofline, store, suites
from benchmarks.__main__ import _deadlines, _seconds, main
from benchmarks.clock import OutOfTime, clocked, deadline, device, on, peak_bytes, threads
from benchmarks.measure import Absent, Finding, GateError, attempt, floor
from benchmarks.models import QUICK, build, config
from benchmarks.roofline import Work
from open_mythos.accounting import account
from open_mythos.errors import EnvironmentError_

ENDLESS = float("inf")


@dataclass
class Steps:
    """A suite whose rows each take their time, or raise."""

    seconds: tuple[float, ...] = (0.0,)
    raises: BaseException | None = None

    def title(self, scale: object) -> str:
        return "made up"

    def rows(self, scale: object) -> Iterator[Finding]:
        for i, seconds in enumerate(self.seconds):
            if seconds == ENDLESS:  # the alarm of the deadline rings now
                signal.raise_signal(signal.SIGALRM)
            time.sleep(seconds)
            yield Finding(f"row {i}", "float32", 1.0, "s")
        if self.raises is not None:
            raise self.raises


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run made-up suites with the arguments given, and read what was saved."""
    monkeypatch.setattr("benchmarks.__main__._limits", list)
    description = machine.describe()
    monkeypatch.setattr(machine, "describe", lambda: description)  # it asks git, which may wait

    def call(made, *arguments):
        monkeypatch.setattr(suites, "of_device", lambda kind: dict.fromkeys(made, 1.0))
        monkeypatch.setattr(suites, "suite", made.__getitem__)
        code = main(["--quick", "--out", str(tmp_path), *arguments])
        return code, store.load(tmp_path)

    return call


def test_a_suite_that_takes_too_long_is_left_and_those_after_it_have_their_time(run, capsys):
    made = {"experts": Steps((0.0, ENDLESS)), "training": Steps((0.0, 0.0))}
    code, saved = run(made, "--budget", "3600")
    assert code == 0
    assert [len(saved[name]["rows"]) for name in made] == [1, 2]
    assert (saved["experts"]["stopped"], saved["experts"]["complete"]) == ("out of time", False)
    assert saved["training"]["complete"]
    assert "incomplete: experts" in capsys.readouterr().out


def test_what_does_not_fit_is_reported_as_not_run(run, capsys):
    made = {name: Steps((0.3,)) for name in ("experts", "training", "loops")}
    code, saved = run(made, "--budget", "0.03")
    assert code == 0
    assert saved == {}
    assert capsys.readouterr().out.count("not run: out of time") == 3


def test_a_failure_loses_nothing_and_is_told(run, capsys):
    wrong, broken = GateError("off by 1"), ZeroDivisionError("oh")
    made = {"experts": Steps(raises=wrong), "training": Steps(raises=broken), "loops": Steps()}
    code, saved = run(made)
    assert code == 1
    assert list(saved) == ["loops"]
    out = capsys.readouterr().out
    assert "wrong: off by 1" in out
    assert "ZeroDivisionError" in out


def test_a_failed_suite_leaves_the_older_results(run):
    _, before = run({"experts": Steps()})
    _, after = run({"experts": Steps(raises=GateError())})
    assert after == before != {}


def test_what_one_suite_leaves_over_those_after_it_have():
    assert _deadlines({"a": 30.0, "b": 10.0}, 100.0, 20.0) == {"a": 115.0, "b": 120.0}
    endless = float("inf")
    assert _deadlines({"a": endless, "b": endless}, 1.0, 5.0) == {"a": 6.0, "b": 6.0}


def test_too_little_memory_is_a_row(run):
    def take():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")

    row = attempt("large", torch.bfloat16, take)
    assert row == Absent("large", "bfloat16", "out of memory: CUDA out of memory. "
                         "Tried to allocate 1 GiB")  # fmt: skip
    suite = Steps()
    suite.rows = lambda scale: iter([row])
    _, saved = run({"experts": suite})
    assert saved["experts"]["rows"][0]["reason"].startswith("out of memory")


def test_no_deadline_outlives_its_block():
    with deadline(time.monotonic() + 3600):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    with pytest.raises(OutOfTime), deadline(time.monotonic() - 1):
        raise AssertionError("begun")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_told_at_once(capsys):
    assert main(["--device", "cuda"]) == EnvironmentError_.exit_code
    told = capsys.readouterr()
    assert "finds no CUDA device" in told.err
    assert told.out == ""


def test_the_device_and_the_threads_are_those_of_the_block():
    before = torch.get_num_threads()
    with on("cpu") as chosen, threads(1):
        assert device() == chosen == torch.device("cpu")
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_the_budget_is_a_positive_number():
    with pytest.raises(argparse.ArgumentTypeError):
        _seconds("-1")


def test_every_suite_has_a_module_and_a_place():
    assert set(suites.names()) == {*suites.CPU, *suites.CUDA}
    assert next(iter(suites.of_device("cuda"))) == "pretraining"
    assert sum(suites.CUDA.values()) <= 480
    for name in suites.names():
        module = suites.suite(name)
        assert module.title(QUICK)
        assert callable(module.rows)


def test_clock_and_peak_memory():
    wall, _ = clocked(lambda: time.sleep(0.02), repeats=2)
    assert wall >= 0.02
    # 4 MB and 2 MB at the same time, then 2 MB less
    kept = []
    peak = peak_bytes(lambda: kept.append(torch.ones(1 << 20).bfloat16()))
    assert peak == (4 << 20) + (2 << 20)


def test_machine_names_contain_no_host_name():
    description = machine.describe()
    assert machine.slug(description) == machine.slug(json.loads(json.dumps(description)))
    chip = {"processor": "Some(R) Chip(TM) CPU @ 2.60GHz", "accelerator": None, "threads": 2}
    assert machine.slug(chip) == "some-chip-2-threads"
    gpu = chip | {"accelerator": "NVIDIA H100 80GB HBM3", "threads": 1}
    assert machine.slug(gpu) == "some-chip-nvidia-h100-80gb-hbm3-1-thread"


def test_busy_machine_warning(monkeypatch):
    quiet = {"load_before": 0.1, "cores": 2, "threads": 2}
    assert machine.warning(quiet) is None
    busy = quiet | {"load_before": 3.0}
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert "load average 3.0" in machine.warning(busy)
    assert "spin" not in machine.warning(busy)
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert "spin" in machine.warning(busy)
    assert "spin" not in machine.warning(busy | {"threads": 1})


def test_load_of_other_processes_is_a_share():
    load = machine.OtherLoad()
    time.sleep(0.05)
    share = load.share()
    assert share is None or 0 <= share <= 1.2


@pytest.mark.parametrize("bound", ["matmuls", "memory"])
def test_the_floor_is_the_larger_time(bound, monkeypatch):
    rates = {"matmuls": 10.0, "memory": 1000.0}
    monkeypatch.setattr(roofline, "peak", lambda *_: rates[bound])
    monkeypatch.setattr(roofline, "bandwidth", lambda *_: 100.0)
    found = floor(Work(flops=1000.0, bytes=500.0, reused=500.0), torch.float32)
    assert (found.bound, found.seconds) == (bound, 100.0 if bound == "matmuls" else 5.0)


def test_what_fits_a_cache_has_its_bandwidth(monkeypatch):
    monkeypatch.setattr(roofline, "read_rates", lambda *_: {1: 50.0, 16: 20.0, 256: 10.0})
    cpu = torch.device("cpu")
    found = [roofline.bandwidth(size * (1 << 20), cpu, 1) for size in (0.5, 1, 2, 300)]
    assert found == [50.0, 50.0, 20.0, 10.0]


@pytest.mark.parametrize("experts", [(0, 0), (4, 2)])
def test_decoding_reads_every_weight_that_some_row_uses(experts):
    """All rows together use all experts; embedding, other loops' adapters and the gate aside."""
    cfg = config(QUICK, "mla", experts)
    once, looped = roofline.decode_weights(cfg, rows=10_000)
    others = (cfg.max_loop_iters - 1) * 2 * cfg.dim * cfg.lora_rank
    total = once + looped + others + cfg.vocab_size * cfg.dim
    count = sum(parameter.numel() for parameter in build(QUICK, "mla", experts).parameters())
    assert total == pytest.approx(count, rel=1e-9)
    if experts[0]:
        expert = 3 * cfg.dim * cfg.expert_dim
        assert looped - roofline.decode_weights(cfg, rows=1)[1] == pytest.approx(2 * expert)


def test_the_bytes_of_a_step_hold_the_cache_once():
    cfg = config(QUICK, "mla", (4, 2))
    works = [roofline.decode_work(cfg, 2, 3, context, size=2) for context in (100, 101)]
    assert works[1].bytes - works[0].bytes == 3 * account(cfg, 2).cache_bytes(element_size=2)


@pytest.mark.parametrize("failing", [None, "batch"])
def test_all_suites_run_in_processes_of_their_own(failing, tmp_path, monkeypatch, capsys):
    """Each is told where to save; one that fails is told of, and does not stop the others."""
    ran = []

    def run(command, check):
        suite = command[command.index("--only") + 1]
        ran.append(suite)
        assert command[-2:] == ["--out", str(tmp_path)]
        return subprocess.CompletedProcess(command, int(suite == failing))

    monkeypatch.setattr("benchmarks.__main__.subprocess.run", run)
    assert main(["--out", str(tmp_path)]) == int(failing is not None)
    assert ran == list(suites.of_device("cpu"))
    assert "no goal missed" in capsys.readouterr().out
