"""The benchmark runs at a tiny size, and its gate stops what is wrong."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import caches, decoding, exits, training
from benchmarks.__main__ import main
from benchmarks.measure import GateError, Row, gate
from benchmarks.models import QUICK, build
from benchmarks.plain import ConcatenatingCache, plain_twin
from open_mythos.cache import KVCache
from open_mythos.layers.mla import MLAttention
from open_mythos.variants import VARIANTS


def test_everything_runs_and_is_saved(tmp_path, capsys):
    main(["--quick", "--out", str(tmp_path)])
    assert "no goal missed" in capsys.readouterr().out
    for suite, n_rows in (("training", 4), ("decoding", 4), ("exits", 8), ("cache", 6)):
        text = (tmp_path / f"{suite}.json").read_text()
        content = json.loads(text)
        assert len(content["rows"]) == n_rows
        assert content["machine"]["torch"] == torch.__version__
        assert str(tmp_path) not in text
    lines = (tmp_path / "cache.md").read_text().splitlines()
    assert len(lines) == 2 + len(VARIANTS)
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_the_twin_is_plain_and_has_the_same_weights(attn_type):
    fast = build(QUICK, attn_type, (4, 2)).eval()
    plain = plain_twin(fast)
    assert all(
        torch.equal(a, b) for a, b in zip(fast.parameters(), plain.parameters(), strict=True)
    )
    assert plain.recurrent.blocks[0].ffn.backend == "reference"
    for module in plain.modules():
        if isinstance(module, MLAttention):
            assert not module.absorbing_is_cheaper(1, 10_000)
    ids = torch.arange(24).view(2, 12)
    caches_ = KVCache(), ConcatenatingCache()
    for start in (0, 6, 9):
        end = {0: 6, 6: 9, 9: 12}[start]
        logits = [
            model(ids[:, start:end], n_loops=3, kv_cache=cache, start_pos=start)
            for model, cache in zip((fast, plain), caches_, strict=True)
        ]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def broken_twin(model):
    """A twin that is wrong in one weight of one expert."""
    twin = plain_twin(model)
    with torch.no_grad():
        twin.recurrent.blocks[0].ffn.down[0, 0, 0] += 0.5
    return twin


@pytest.mark.parametrize("suite", [training, decoding])
def test_nothing_is_timed_when_results_differ(suite, monkeypatch):
    def never(*_, **__):
        raise AssertionError("timed")

    monkeypatch.setattr(suite, "plain_twin", broken_twin)
    monkeypatch.setattr(suite, "compare", never)
    with pytest.raises(GateError, match="off by"):
        next(suite.rows(QUICK))


def test_exits_are_timed_only_if_they_equal_their_rows_alone(monkeypatch):
    told = exits.GivenDepths.__call__

    def late(self, look, memory):
        return told(self, replace(look, t=look.t - 1), memory)

    monkeypatch.setattr(exits.GivenDepths, "__call__", late)
    with pytest.raises(GateError, match="off by"):
        next(exits.rows(QUICK))


@pytest.mark.parametrize("shape", [exits._equal, exits._uniform, exits._geometric])
def test_exits_have_the_mean_they_are_named_after(shape):
    depths = shape(70, 10).float()
    assert abs(depths.mean() - exits.MEAN) < 0.1
    assert depths.min() >= 1
    assert depths.max() <= exits.DEPTH


def test_the_cache_suite_checks_its_formula(monkeypatch):
    monkeypatch.setattr(KVCache, "nbytes", 1)
    with pytest.raises(GateError, match="by the formula"):
        next(caches.rows(QUICK))


def test_the_gate():
    exact, near, far = (torch.ones(8) + noise for noise in (0, 1e-2, 3e-2))
    assert gate("", [near], [near], reference=[exact], dtype=torch.bfloat16)[0] < 2e-2
    for dtype, result in ((torch.bfloat16, far), (torch.float32, near), (torch.float32, far / 0)):
        with pytest.raises(GateError):
            gate("", [result], [near], reference=[exact], dtype=dtype)


@pytest.mark.parametrize(("goal", "verdict"), [(None, "no goal"), (2.0, "met"), (2.1, "MISSED")])
def test_verdicts(goal, verdict):
    row = Row("", "float32", 1.0, 2.0, 2.0, 2.0, goal, 0.0, 0.0)
    assert row.verdict == verdict
