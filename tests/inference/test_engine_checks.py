"""The checks of the engine hold, and fail when the engine is broken."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from helpers import small_model

from open_mythos.errors import InternalError
from open_mythos.hub.places import stored_tokenizer
from open_mythos.hub.pretrained import from_pretrained
from open_mythos.inference import check, oracle, runner, scheduler
from open_mythos.inference.batch import Batch
from open_mythos.inference.levels import LevelCache, LevelRows
from open_mythos.inference.places import Places
from open_mythos.inference.runner import Runner
from open_mythos.inference.slot_rules import SlotRules
from open_mythos.model.causal_lm import CausalLM

CONTEXT = 128


@pytest.fixture(scope="module")
def mla() -> CausalLM:
    """MLA with experts."""
    return small_model("mla", max_seq_len=CONTEXT)


@pytest.fixture(scope="module")
def gqa() -> CausalLM:
    """GQA, dense layers."""
    return small_model("gqa", max_seq_len=CONTEXT, n_experts=0)


def findings(found: Iterator[str | None]) -> list[str]:
    """Findings of a check that compared something."""
    results = list(found)
    assert results
    return [each for each in results if each is not None]


@pytest.mark.parametrize("name", ["mla", "gqa"])
def test_parity(name, request):
    assert not findings(check.parity(request.getfixturevalue(name), 10, 4))


@pytest.mark.parametrize("name", ["mla", "gqa"])
def test_schedules(name, request):
    assert not findings(check.schedules(request.getfixturevalue(name), 2, 5))


@pytest.mark.parametrize("broken", check.BREAKS)
def test_schedules_notice(broken, mla):
    """Without one of the rules of exact mode, bits depend on the company."""
    assert findings(check.schedules(mla, 2, 5, broken))


def test_prefix(gqa):
    assert not findings(check.prefix(gqa, 5))


def test_preempt(mla):
    assert not findings(check.preempt(mla, 5, (7, 30)))


def leak(places: Places, sequence: Any) -> None:
    """Places.clear that forgets the pages."""
    places.slots[sequence.slot] = None
    sequence.pages = []


def one_level_back(rows: LevelRows, layer: int, loop: Any) -> Any:
    """LevelRows._level of the loop before, but for the first."""
    if isinstance(loop, torch.Tensor):
        loop = (loop - 1).clamp_min(0)
    return LEVEL(rows, layer, loop)


def pad_with_a_live_row(own: Runner, sequences: Any) -> Iterator[Batch]:
    """Runner._batches with a row of another batch in the place of the dummies."""
    for batch in BATCHES(own, sequences):
        live = [each.slot for each in sequences if each not in batch.sequences]
        slots_R = batch.slots_R.clone()
        slots_R[: batch.n_dummies] = live[0] if live else slots_R[0]
        yield replace(batch, slots_R=slots_R)


def without_depth(facts: Any, prompt: Any, unit: int) -> Any:
    """unit_keys that drop all numbers and rules of a request."""
    *_, salt = facts
    return KEYS((salt,), prompt, unit)


LEVEL, BATCHES, KEYS = LevelRows._level, Runner._batches, scheduler.unit_keys


def nothing(*args: Any, **more: Any) -> None:
    """Do nothing."""


MUTANTS: dict[str, tuple[object, str, Callable[..., Any]]] = {
    "no copy on exit": (LevelCache, "copy_on_exit", nothing),
    "level t - 1": (LevelRows, "_level", one_level_back),
    "memory of a rule kept": (SlotRules, "begin", nothing),
}


def noticed(found: Iterator[str | None]) -> bool:
    """Whether a check has a finding, or the engine stops by itself."""
    try:
        return any(found)
    except (InternalError, RuntimeError):
        return True


@pytest.mark.parametrize("name", MUTANTS)
def test_parity_notices(name, mla, monkeypatch):
    monkeypatch.setattr(*MUTANTS[name])
    assert noticed(check.parity(mla, 40, 6))


def test_rows_that_pad_change_no_state(mla, monkeypatch):
    """Requests that all run at the same time."""
    monkeypatch.setattr(runner, "TILE", 4)  # so that a row that runs is outside of a batch
    draw = Random(5)
    asked = [oracle.random_request(draw, f"{i}", mla) for i in range(10)]
    asked = [replace(each, max_tokens=6, ends=()) for each in asked]
    plain = {each.id: oracle.alone(mla, each).tokens for each in asked}
    for batches in (BATCHES, pad_with_a_live_row):
        monkeypatch.setattr(Runner, "_batches", batches)
        engine = oracle.small_engine(mla, slots=10, exact=True, ticks_per_chunk=1)
        done = oracle.together(engine, asked)
        assert {id: each.tokens for id, each in done.items()} == plain


def test_schedules_notice_a_leak(mla, monkeypatch):
    monkeypatch.setattr(Places, "clear", leak)
    with pytest.raises(InternalError, match="pages are not counted"):
        findings(check.schedules(mla, 1, 5))


def test_prefix_notices_a_key_without_depth(gqa, monkeypatch):
    monkeypatch.setattr(scheduler, "unit_keys", without_depth)
    assert noticed(check.prefix(gqa, 5))


def test_commands(tmp_path, capsys):
    """What they print, and exit codes."""
    folder = str(tmp_path / "T")
    assert check.main(["make", folder, "--seed", "3", "--experts", "4"]) == 0
    assert check.main(["parity", folder, "--requests", "2"]) == 0
    assert capsys.readouterr().out.endswith("parity: 2 comparisons, 0 failed\n")
    assert check.main(["schedules", folder, "--cases", "1", "--break", "tiles"]) == 1
    assert "token" in capsys.readouterr().out
    assert check.main(["parity", str(tmp_path / "absent")]) == 2


def test_help_loads_no_torch():
    code = (
        "import sys; from open_mythos.inference import check\n"
        "try: check.main(['--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules)\n"
        "sys.exit(2)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_the_made_model_varies(tmp_path):
    """Exits, tokens and ends of a checkpoint for checks are not all alike."""
    folder = str(tmp_path)
    oracle.write_checkpoint(folder, "gqa", 0, 1)
    model, draw = from_pretrained(folder), Random(0)
    assert stored_tokenizer(folder).vocab_size == model.cfg.vocab_size
    some = [oracle.random_request(draw, f"{i}", model) for i in range(12)]
    gated = [replace(e, rule="gate", numbers=(0.7,), max_loops=6, min_loops=1) for e in some]
    done = oracle.together(oracle.small_engine(model), gated).values()
    assert len({loops for each in done for loops in each.loops}) >= 3
    assert len({token for each in done for token in each.tokens}) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("attn", ["gqa", "mla"])
@pytest.mark.parametrize("experts", [0, 8])
@pytest.mark.parametrize("command", ["parity", "schedules", "prefix", "preempt"])
def test_full_sizes(command, attn, experts, tmp_path):
    oracle.write_checkpoint(str(tmp_path), attn, experts, 11)
    assert check.main([command, str(tmp_path), "--seed", "12"]) == 0
