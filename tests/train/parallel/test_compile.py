"""Compiled blocks match eager ones, with few graphs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import open_mythos.train.parallel.parallelize as parallel
from open_mythos import LoopTrace, OpenMythos
from open_mythos.devices import autocast
from open_mythos.model.dense import DenseTransformer
from open_mythos.train import Trainer, build_model
from open_mythos.train.parallel.compile import compile_block
from tests.helpers import random_ids, randomise, small_config
from tests.train.conftest import CountingLoader, tiny_run
from tests.train.ranks import run_ranks

IDS = random_ids(4, 7)
SEEDS = torch.arange(4)
RAGGED = [2, 4, 5, 5]
"""Depths whose rows exit early; two remain at the end, since a single row has its own graph."""


# raised by PyTorch itself while tracing
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    # pytest would collect PyTorch's trace log, which takes longer than the test
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    yield
    torch._dynamo.reset()


def pair(backend: str = "eager", **changes: object) -> tuple[OpenMythos, OpenMythos]:
    """Return a model with compiled blocks and an eager copy."""
    compiled = randomise(OpenMythos(small_config(**{"attn_type": "gqa", **changes})))
    plain = copy.deepcopy(compiled)
    compile_all(compiled, backend)
    return compiled, plain


def compile_all(model: OpenMythos, backend: str = "eager") -> None:
    looped = list(model.recurrent.blocks)
    for block in parallel.transformer_blocks(model):
        compile_block(block, rows_leave=block in looped, backend=backend)


def results(
    model: OpenMythos, dtype: torch.dtype, n_loops: object, grad_loops: int | None
) -> dict[str, Tensor]:
    """Return logits, traced loads and gradients."""
    model.zero_grad()
    trace = LoopTrace(keep_routing=True)
    with autocast(torch.device("cpu"), dtype):
        logits = model(IDS, n_loops=n_loops, grad_loops=grad_loops, sample_seeds=SEEDS, trace=trace)
    found = {"logits": logits.detach().float()}
    found |= {f"load {key}": load for key, load in trace.load.items()}
    if torch.is_grad_enabled():
        scores = sum(each.square().mean() for each in trace.scores.values() if each.requires_grad)
        (logits.float().square().mean() + scores).backward()
        found |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found


def check(
    models: tuple[OpenMythos, OpenMythos],
    n_loops: object,
    grad_loops: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Check that both models agree, and return the number of graphs so far."""
    got, expected = (results(model, dtype, n_loops, grad_loops) for model in models)
    assert got.keys() == expected.keys()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for name, value in expected.items():
        error = (got[name] - value).norm() / value.norm().clamp_min(1e-12)
        assert error <= tolerance, (name, float(error))
    assert not counters["graph_break"], list(counters["graph_break"])
    return counters["stats"]["unique_graphs"]


def test_one_graph_serves_all_loops():
    """Expect two graphs for two kinds of block."""
    models = pair()
    for depth in (2, 5, RAGGED):
        assert check(models, depth) == 2


@pytest.mark.parametrize(
    "choice",
    [
        {"value_embedding": True, "state_norm": "loop"},
        {"window": 3, "layer_overrides": {"0": {"rope_theta": 20.0, "window": 0}}},
    ],
)
def test_layers_with_their_own(choice):
    models = pair(**choice)
    for depth in (2, RAGGED):
        assert check(models, depth) == 3


@pytest.mark.slow
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_causes_of_further_graphs(attn_type):
    """Loops without gradient and single rows need a graph; evaluation and recompute do not."""
    models = pair(attn_type=attn_type)
    for n_loops in (2, 12, RAGGED):
        assert check(models, n_loops) == 2
    assert check(models, 6, grad_loops=2) == 3  # the loop alone runs without gradient
    assert check(models, RAGGED, grad_loops=2) == 3
    with torch.no_grad():
        assert check(models, 3) == 4
    assert check(tuple(model.eval() for model in models), 3) == 4
    for model in models:
        model.train().recurrent.checkpoint = True
    assert check(models, RAGGED, grad_loops=3) == 4
    assert check(models, [2, 3, 4, 6]) == 5  # the last loops have a single row


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiling_whole_modules_needs_more_graphs():
    """Negative control: ``block.compile()`` includes the code around ``compute``."""
    compiled, _ = pair()
    for block in parallel.transformer_blocks(compiled):
        block.compiled = None
        block.compile(backend="eager")
    results(compiled, torch.float32, 4, None)
    assert counters["stats"]["unique_graphs"] + len(counters["graph_break"]) > 2


@pytest.mark.slow
def test_dropout_autocast_and_two_looped_blocks():
    models = pair("aot_eager", dropout=0.2, recurrent_layers=2, loop_embedding=True)
    assert check(models, 2, dtype=torch.bfloat16) <= 4
    assert check(models, RAGGED, dtype=torch.bfloat16) <= 4
    assert check(models, 5, grad_loops=1, dtype=torch.bfloat16) <= 6


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sorted", "grouped", "batched"])
def test_experts_without_deferred_gradients(backend, monkeypatch):
    monkeypatch.setattr("open_mythos.ops.experts.routed.DEFERRED_TOKENS", 0)
    assert check(pair("aot_eager", moe_backend=backend), 3) == 2


@pytest.mark.slow
def test_packed_and_padded_batches():
    model, plain = pair()
    documents = torch.tensor([[0, 0, 1, 1, 1, 2, 2]] * 4)
    padding = torch.ones(4, 7, dtype=torch.bool)
    padding[1, :3] = False
    for marks in ({"document_ids": documents}, {"attention_mask": padding}):
        got, expected = (each(IDS, RAGGED, **marks).detach() for each in (model, plain))
        torch.testing.assert_close(got, expected)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 4


def test_cached_calls_are_not_compiled():
    model, plain = (each.eval() for each in pair())
    want = plain.generate(IDS[:, :3], 3, n_loops=2, seed=0)
    assert torch.equal(model.generate(IDS[:, :3], 3, n_loops=2, seed=0), want)
    assert not counters["stats"]["unique_graphs"]


def test_identical_blocks_share_a_graph():
    model = randomise(DenseTransformer(small_config(attn_type="gqa"), n_layers=4))
    plain = copy.deepcopy(model)
    for block in parallel.transformer_blocks(model):
        compile_block(block, rows_leave=False, backend="eager")
    torch.testing.assert_close(model(IDS), plain(IDS))
    assert counters["stats"]["unique_graphs"] == 1


def losses(**options: object) -> list[float]:
    run = tiny_run(**options)
    trainer = Trainer(build_model(run), CountingLoader(run), run)
    return [trainer.train_step(step).loss for step in range(3)]


def of_ranks(ranks, kinds):
    found = {}
    for name, options in kinds.items():
        for compiled in (False, True):
            torch._dynamo.reset()
            parallel.compile_block = partial(compile_block, backend="aot_eager")
            with ranks.group(2):
                found[name, compiled] = losses(
                    **options | {"train": options["train"] | {"compile": compiled}}
                )
    return found


@pytest.mark.slow
def test_in_several_processes():
    """Combine checkpointing and compilation with DDP, FSDP2 and expert parallelism."""
    depth, train = {"plan": "uniform", "low": 1, "high": 3}, {"global_batch": 4, "steps": 3}
    kinds = {
        "ddp": ({"kind": "ddp"}, True),
        "fsdp": ({"kind": "fsdp"}, True),
        "experts": ({"kind": "fsdp", "experts": 2}, False),
    }
    options = {
        name: {"depth": depth, "parallel": kind, "train": train | {"checkpoint_loops": again}}
        for name, (kind, again) in kinds.items()
    }
    (found, _) = run_ranks(2, of_ranks, options)
    for name in options:
        assert found[name, True] == pytest.approx(found[name, False], abs=1e-5), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_losses_are_equal():
    options = {"depth": {"plan": "uniform", "low": 1, "high": 3}, "train": {"global_batch": 4}}
    plain = losses(**options)
    options["train"]["compile"] = True
    assert losses(**options) == pytest.approx(plain, abs=1e-5)
