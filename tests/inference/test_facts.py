"""What the engine's process says of its model."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
from helpers import randomise, small_config, small_model

from open_mythos import DenseTransformer, from_pretrained, save_pretrained
from open_mythos.errors import DataError
from open_mythos.inference.engine import Engine
from open_mythos.inference.facts import measured_speed, self_check, served_facts
from open_mythos.inference.request import Finished, Outcome, Request, Token
from open_mythos.inference.server.host import Host, worker_command
from open_mythos.inference.worker import build_engine
from open_mythos.ops.sampling import SamplingParams
from open_mythos.run_folder import STATE_FILE, VALIDATED_DEPTHS, validated_range


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_pretrained(small_model("mla"), tmp_path)
    return tmp_path


def facts_of(checkpoint: Path, bits: str = "") -> dict[str, object]:
    model = from_pretrained(checkpoint)
    return served_facts(model, Engine(model, slots=4, context=48), str(checkpoint), bits)


def test_a_looped_model(checkpoint: Path):
    engine = {"slots": 4, "context": 48}
    options = {"checkpoint": str(checkpoint), "device": "cpu", "engine": engine}
    _, facts = build_engine(options)
    assert json.loads(json.dumps(facts)) == facts
    assert len(facts.pop("fingerprint")) == 64
    assert facts.pop("pages") > 0
    assert facts.pop("loop_tokens_per_s") > 0
    assert facts == {
        "dense": False, "vocab_size": 61, "context": 48, "trained_depth": 4, "max_loops": 4,
        "validated_depth": None, "rules": ["gate", "change", "acceleration"],
        "gate_threshold": 0.99, "slots": 4, "exact": True, "device": "cpu",
        "weights": "raw",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("record", "expected"),
    [({"low": 2, "high": 6}, [2, 6]), ({"low": None, "high": None}, None), (None, None)],
)
def test_validated_depth(checkpoint: Path, record: object, expected: object):
    (checkpoint / STATE_FILE).write_text(json.dumps({VALIDATED_DEPTHS: record}))
    assert facts_of(checkpoint)["validated_depth"] == expected


@pytest.mark.parametrize(
    "record",
    [
        3, {}, {"low": 2}, {"low": "2", "high": "6"}, {"low": 6, "high": 2},
        {"low": 2, "high": 6, "tolerance": 0.05, "rows": [3]},
        {"low": 2, "high": 6, "rows": [{"depth": 2, "loss": 1.0}]},
    ],
)  # fmt: skip
def test_a_record_of_other_kinds_is_refused(checkpoint: Path, record: object):
    (checkpoint / STATE_FILE).write_text(json.dumps({VALIDATED_DEPTHS: record}))
    with pytest.raises(DataError, match="validated depths"):
        validated_range(checkpoint)


def test_a_dense_model(tmp_path: Path):
    save_pretrained(DenseTransformer(small_config(), 2).eval(), tmp_path)
    facts = facts_of(tmp_path)
    assert facts["dense"]
    assert facts["rules"] == []
    assert facts["trained_depth"] is facts["validated_depth"] is None


def test_the_fingerprint_is_that_of_the_weights(checkpoint: Path, tmp_path: Path):
    before = facts_of(checkpoint)["fingerprint"]
    assert facts_of(checkpoint)["fingerprint"] == before
    assert facts_of(checkpoint, "int8")["fingerprint"] != before
    model = small_model("mla")
    model.head.weight.data[0, 0] += 1
    save_pretrained(model, checkpoint)
    assert facts_of(checkpoint)["fingerprint"] != before


def test_speed_counts_prompts_and_loops():
    """4 requests at 4 loops: 15 tokens, and 7 of the 8 new ones; every reading is a second."""
    engine = Engine(small_model("mla"), slots=4, context=48)
    ticks = iter(range(10**6))
    speed = measured_speed(engine, 10**9, lambda: float(next(ticks)))
    assert speed * (next(ticks) - 1) == pytest.approx(4 * 4 * (15 + 7))
    assert not engine.busy


@pytest.mark.parametrize("context", [2, 8, 9])
def test_speed_in_a_short_context(context):
    engine = Engine(small_model("mla"), slots=2, context=context)
    self_check(engine)
    assert measured_speed(engine, 0.0) > 0


def test_a_dense_model_in_the_engine():
    """A row that has just got its first token waits for its place in the edge."""
    model = randomise(DenseTransformer(small_config(), 2)).eval()
    params = SamplingParams(6, temperature=0.0)
    prompts = [[5, 6, 7], [9, 8], [1, 2, 3, 4]]
    together = Engine(model, slots=2, context=48).generate(prompts, params)
    for prompt, completion in zip(prompts, together, strict=True):
        alone = model.generate(torch.tensor([prompt]), params)
        assert [*prompt, *completion.tokens] == alone[0].tolist()


@pytest.mark.slow
def test_the_whole_process(checkpoint: Path):
    """A real engine behind a host answers as the same engine does here."""
    options = {"checkpoint": str(checkpoint), "device": "cpu", "engine": {"slots": 2}}
    request = Request("a", (5, 6, 7), 6, temperature=0.0, max_loops=3, min_loops=3)
    engine, facts = build_engine(options)
    engine.add(request)
    here = [event for _ in range(100) for event in engine.step()]

    async def there() -> list[object]:
        host = Host(worker_command(options))
        try:
            await host.start()
            assert host.facts["fingerprint"] == facts["fingerprint"]
            return [event async for event in host.submit(request).events]
        finally:
            await host.stop()

    assert asyncio.run(there()) == here
    assert here[-1] == Finished("a", Outcome.LENGTH)
    assert [event.loops for event in here if isinstance(event, Token)] == [3] * 6
