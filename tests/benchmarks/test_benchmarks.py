"""The benchmark runs at a tiny size, and its gates stop what is wrong."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import (
    batch,
    caches,
    context,
    decoding,
    exits,
    experts,
    kernels,
    loops,
    measure,
    prefill,
    pretraining,
    roofline,
    serving,
    start,
    suites,
    training,
)  # fmt: skip
from benchmarks.__main__ import main
from benchmarks.clock import shares_text, where_time_goes
from benchmarks.measure import Finding, GateError, Row, compare, gate
from benchmarks.models import QUICK, build, dense_like
from benchmarks.plain import ConcatenatingCache, common_parts, plain_twin
from open_mythos.accounting import account
from open_mythos.model.cache import KVCache
from open_mythos.model.layers.experts import RoutedExperts
from open_mythos.model.layers.mla import MLAttention
from open_mythos.model.layers.moe import MoEFFN

OWN = tuple(name for name in suites.CPU if name not in ("http", "quantized", "compiled"))


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    """Use one thread, and peaks from small matmuls and short reads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(roofline, "PRODUCT", {"cpu": 128})
    monkeypatch.setattr(roofline, "SIZES", {"cpu": (1,)})
    for measured in (roofline.peak, roofline.read_rates, roofline.copy_rate):
        measured.cache_clear()
    yield
    torch.set_num_threads(threads)
    for measured in (roofline.peak, roofline.read_rates, roofline.copy_rate):
        measured.cache_clear()


@pytest.mark.slow
def test_everything_runs_and_is_saved(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(suites, "CPU", OWN)
    monkeypatch.setattr(start, "COMMANDS", {"python": (("-c", ""), 0.3, "")})
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    assert "no goal missed" in capsys.readouterr().out
    n_rows = {
        "experts": 4, "training": 7, "loops": 15, "prefill": 4, "decoding": 4,
        "context": 12, "batch": 6, "exits": 8, "engine": 8, "start": 1, "cache": 6,
    }  # fmt: skip
    assert set(n_rows) == set(OWN)
    for suite in OWN:
        text = (tmp_path / f"{suite}.json").read_text()
        content = json.loads(text)
        assert len(content["rows"]) == n_rows[suite], suite
        assert content["complete"]
        assert content["machine"]["torch"] == torch.__version__
        assert content["limits"][0]["peak_flops"]["float32"] > 1e8
        assert str(tmp_path) not in text


@pytest.mark.slow
def test_decoding_is_shown_in_all_threads_too():
    torch.set_num_threads(2)
    names = [(row.name, row.threads) for row in decoding.rows(QUICK)]
    assert names.count(("mla, context 40, 2 threads", 2)) == 2
    assert {threads for name, threads in names if "threads" not in name} == {1}
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("suite", [kernels, serving])
def test_what_a_gpu_runs_runs_on_a_cpu_too(suite):
    rows = list(suite.rows(replace(QUICK, served=(2,))))
    assert [row.verdict for row in rows] == ["no goal"] * (6 if suite is kernels else 2)
    assert all(row.share > 0 and row.error < 2e-2 for row in rows)


def test_training_at_real_size_counts_the_loops_that_ran():
    rows = list(pretraining.rows(QUICK))
    assert [row.unit for row in rows] == ["% MFU", "% MFU"], "nano has no experts"
    for row in rows:
        tokens = QUICK.large_batch * QUICK.large_tokens
        assert row.numbers["tokens_per_second"] == pytest.approx(tokens / row.seconds)
        expected = row.floor.flops / row.seconds / row.floor.peak
        assert row.numbers["mfu"] == pytest.approx(expected)


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_the_reference_model_has_the_same_weights(attn_type):
    fast = build(QUICK, attn_type, (4, 2)).eval()
    plain = plain_twin(fast)
    assert all(
        torch.equal(a, b) for a, b in zip(fast.parameters(), plain.parameters(), strict=True)
    )
    assert plain.recurrent.blocks[0].ffn.experts.backend == "reference"
    for module in plain.modules():
        if isinstance(module, MLAttention):
            assert not module.absorbing_is_cheaper(1, 10_000)
    ids = torch.arange(24).view(2, 12)
    caches_ = KVCache(), ConcatenatingCache()
    for begin in (0, 6, 9):
        end = {0: 6, 6: 9, 9: 12}[begin]
        logits = [
            model(ids[:, begin:end], n_loops=3, kv_cache=cache, start_pos=begin)
            for model, cache in zip((fast, plain), caches_, strict=True)
        ]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def test_common_parts_have_the_same_weights_and_neither_experts_nor_history(monkeypatch):
    model = build(QUICK, "mla", (4, 2)).eval()
    rest = common_parts(model, attention=True)
    pairs = zip(model.parameters(), rest.parameters(), strict=True)
    assert all(a is b for a, b in pairs)

    def never(*_, **__):
        raise AssertionError("computed")

    ids, cache = torch.arange(2).view(2, 1), KVCache(8)
    decoding.fill(cache, rest, 2, 4, 2)
    before = {key: slot.clone() for key, slot in cache._slots.items()}
    with monkeypatch.context() as patched:
        for name in ("expanded", "absorbed"):
            patched.setattr(MLAttention, name, never)
        patched.setattr(RoutedExperts, "forward", never)
        logits = rest(ids, 2, cache, 4)
    assert logits.isfinite().all()
    assert all(torch.equal(before[key], slot) for key, slot in cache._slots.items())
    assert model(ids).isfinite().all()  # the model itself has kept its parts


def test_the_dense_model_takes_as_many_flops():
    model = build(QUICK, "mla", (4, 2))
    dense = account(dense_like(model.cfg, 5)).training_flops(context=64)
    assert dense == pytest.approx(account(model, 5).training_flops(context=64), rel=0.05)


def wrong_twin(model):
    """A twin that is wrong in one weight of one expert, and in its head."""
    twin = plain_twin(model)
    with torch.no_grad():
        twin.head.weight.mul_(2)
        for block in twin.recurrent.blocks:
            if isinstance(block.ffn, MoEFFN):
                block.ffn.down[0, 0, 0] += 0.5
    return twin


@pytest.mark.parametrize(
    "suite", [training, decoding, loops, prefill, context, serving, pretraining]
)
def test_nothing_is_timed_when_results_differ(suite, monkeypatch):
    def never(*_, **__):
        raise AssertionError("timed")

    monkeypatch.setattr(suite, "plain_twin", wrong_twin)
    for timer in ("compare", "alternate", "clocked"):
        monkeypatch.setattr(suite, timer, never, raising=False)
    with pytest.raises(GateError, match=r"off by|not that of"):
        next(suite.rows(QUICK))


def test_layers_and_ops_are_timed_only_if_they_equal_their_references(monkeypatch):
    def doubled(layer, backend):
        twin = variant(layer, backend)
        twin.down = torch.nn.Parameter(2 * layer.down.detach())
        return twin

    variant = experts._variant
    monkeypatch.setattr(experts, "_variant", doubled)
    with pytest.raises(GateError, match="off by"):
        next(experts.rows(QUICK))
    monkeypatch.setattr(kernels, "latent_attend", lambda q, entry, rank, backend:
                        q[..., :rank] * (2 if backend == "auto" else 1))  # fmt: skip
    with pytest.raises(GateError, match="off by"):
        next(kernels.rows(QUICK))


def test_a_batch_is_timed_only_if_its_rows_equal_themselves_alone(monkeypatch):
    monkeypatch.setattr(batch, "distances", lambda *_: [0.1])
    with pytest.raises(GateError, match="itself alone"):
        next(batch.rows(QUICK))


def test_starting_fails_if_torch_is_loaded_or_the_help_is_not_printed():
    for arguments, begins in ((("-c", "import sys; sys.exit(1)"), ""), (("-c", "print(1)"), "us")):
        with pytest.raises(GateError, match="ended with"):
            start._run("it", arguments, begins)
    assert "torch" in start.IMPORT


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
    with pytest.raises(GateError, match="bytes"):
        next(context.rows(QUICK))


def test_the_gate():
    exact, near, far = (torch.ones(8) + noise for noise in (0, 1e-2, 3e-2))
    assert gate("", [near], [near], reference=[exact], dtype=torch.bfloat16)[0] < 2e-2
    for dtype, result in ((torch.bfloat16, far), (torch.float32, near), (torch.float32, far / 0)):
        with pytest.raises(GateError):
            gate("", [result], [near], reference=[exact], dtype=dtype)


@pytest.mark.parametrize(("goal", "verdict"), [(None, "no goal"), (2.0, "met"), (2.1, "MISSED")])
def test_verdicts(goal, verdict):
    assert Row("", "float32", 1.0, 2.0, 2.0, 2.0, goal, 0.0, 0.0).verdict == verdict
    assert Finding("", "float32", 2.0, "x", goal=goal).verdict == verdict
    most = Finding("", "float32", 2.05, "x", goal=goal, at_most=True)
    assert most.verdict == {2.0: "MISSED", 2.1: "met"}.get(goal, "no goal")


def test_a_row_says_what_no_fast_form_could_save(monkeypatch):
    taken = {"fast": 2.0, "plain": 4.0, "rest": 1.0, "dense": 3.0}

    def alternate(forms, **_):
        return {name: measure.Times(taken[name], taken[name]) for name in forms}

    monkeypatch.setattr(measure, "alternate", alternate)
    x = torch.ones(300, 300)
    arguments = {"alternations": 1, "errors": (0.0, 0.0), "rest": ("the rest", None)}
    missed = compare("", torch.float32, lambda: x @ x, None, goal=5.0, **arguments)
    assert (missed.verdict, missed.ratio, missed.rest_seconds) == ("MISSED", 2.0, 1.0)
    assert "take 1 s, 50% of the fast time" in missed.reason
    assert "at most 4.0x" in missed.reason
    assert "time of fast: matmuls" in missed.reason
    met = compare("", torch.float32, None, None, goal=2.0, **arguments)
    assert (met.verdict, met.why) == ("met", "")


def test_the_cost_of_a_loop_is_compared_with_the_mean():
    even = loops.deviations({2: 5.0, 4: 9.0, 8: 17.0})
    assert even == pytest.approx({"2 to 4": 0, "4 to 8": 0})
    dearer = loops.deviations({2: 5.0, 4: 9.0, 8: 21.0})
    assert dearer == pytest.approx({"2 to 4": 2 / (16 / 6) - 1, "4 to 8": 3 / (16 / 6) - 1})


def test_the_profiler_finds_the_matmuls():
    x = torch.randn(400, 400)
    shares = where_time_goes(lambda: x @ x)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["matmuls"] > 0.5
    assert shares_text({"matmuls": 0.5}) == "matmuls 50%"
