"""The exit report against forward calls and counted positions."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.data.batch import IGNORE_INDEX
from open_mythos.errors import ConfigError, DataError
from open_mythos.evaluation import GivenDepths, evaluate_exits
from open_mythos.evaluation.early_exit import deal, run_exits, token_scores
from open_mythos.model.dense import DenseTransformer
from open_mythos.model.exit_rules import ExitRule, FixedDepth, exit_rule
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.trace import LoopTrace

from .small import BATCHES, TOKENS, batch, busy, config

DEPTH = 6
RULE = "change:0.2"
"""Its exits on the noisy model are spread over the loops."""


@pytest.fixture(scope="module")
def model() -> OpenMythos:
    torch.manual_seed(0)  # module-scoped, so it precedes the per-test seed
    return busy(OpenMythos(config())).eval()


def by_hand(
    model: OpenMythos, n_loops: int, rules: list[ExitRule | None]
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield losses and hits of the targets, and the exits, from full logits."""
    for each, rule in zip(BATCHES, rules, strict=True):
        trace = LoopTrace()
        with torch.no_grad():
            logits = model(
                each.input_ids, n_loops, document_ids=each.document_ids, exit_rule=rule, trace=trace
            )
        target = each.targets != IGNORE_INDEX
        losses = F.cross_entropy(logits[target], each.targets[target], reduction="none")
        yield losses, logits[target].argmax(-1) == each.targets[target], trace.exits


def test_metrics_match_forward_calls(model):
    rule = exit_rule(RULE, model)
    report = evaluate_exits(model, BATCHES, rule, DEPTH, seed=3)
    losses, right, exits = zip(*by_hand(model, DEPTH, [rule] * 3), strict=True)
    loops = torch.cat([each.flatten() for each in exits]).double()
    assert report.adaptive.loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)
    assert report.adaptive.accuracy == pytest.approx(torch.cat(right).double().mean().item())
    assert report.adaptive.mean_loops == pytest.approx(loops.mean().item())
    assert report.histogram == [int((loops == n).sum()) for n in range(1, DEPTH + 1)]
    assert len(set(loops.tolist())) >= 4
    for row, depth in ((report.full, DEPTH), (report.mean_depth, math.ceil(loops.mean()))):
        fixed = [losses for losses, *_ in by_hand(model, depth, [None] * 3)]
        assert row.loss == pytest.approx(torch.cat(fixed).mean().item(), rel=1e-6)
        assert (row.mean_loops, row.computed) == (depth, pytest.approx(depth / DEPTH))
    dealt: list[ExitRule | None] = [GivenDepths(each) for each in deal(exits, 3)]
    random = [losses for losses, *_ in by_hand(model, DEPTH, dealt)]
    assert report.random.loss == pytest.approx(torch.cat(random).mean().item(), rel=1e-6)
    assert report.random.mean_loops == pytest.approx(report.adaptive.mean_loops)
    assert (report.tokens, report.n_loops) == (TOKENS, DEPTH)
    assert len({round(row.loss, 4) for row in report.rows}) == 4


def test_computed_positions_are_counted(model, monkeypatch):
    """Against the positions that actually pass through the looped block."""
    seen = 0
    step = model.recurrent.step

    def counting(h_BTD, *rest):
        nonlocal seen
        seen += h_BTD.shape[0] * h_BTD.shape[1]
        return step(h_BTD, *rest)

    monkeypatch.setattr(model.recurrent, "step", counting)
    for rules in ([exit_rule(RULE, model)] * 3, [FixedDepth(2)] * 3, [None] * 3):
        seen = 0
        assert run_exits(model, BATCHES, DEPTH, rules).computed == seen


def test_computed_is_between_the_mean_and_full_depth(model):
    report = evaluate_exits(model, BATCHES, exit_rule(RULE, model), DEPTH)
    for row in (report.adaptive, report.random):
        assert row.mean_loops / DEPTH <= row.computed < 1


def test_given_depths_are_run(model):
    generator = torch.Generator().manual_seed(0)
    for each in BATCHES:
        depths = torch.randint(1, DEPTH + 1, each.targets.shape, generator=generator)
        done = run_exits(model, [each], DEPTH, [GivenDepths(depths)])
        assert torch.equal(done.exits[0], depths)


def test_a_replay_equals_the_rule(model):
    rule = exit_rule(RULE, model)
    first = run_exits(model, BATCHES, DEPTH, [rule] * 3)
    again = run_exits(model, BATCHES, DEPTH, [GivenDepths(exits) for exits in first.exits])
    assert torch.equal(first.losses_N, again.losses_N)


def test_dealing_permutes_the_exits():
    exits = [torch.arange(12).view(3, 4), torch.arange(12, 22).view(2, 5)]
    dealt = deal(exits, 0)
    assert [each.shape for each in dealt] == [each.shape for each in exits]
    flat = torch.cat([each.flatten() for each in dealt])
    assert flat.sort().values.tolist() == list(range(22))
    assert (flat == torch.arange(22)).float().mean() < 0.3
    assert all(torch.equal(a, b) for a, b in zip(dealt, deal(exits, 0), strict=True))
    assert not torch.equal(flat, torch.cat([each.flatten() for each in deal(exits, 1)]))


def test_rows_without_targets_are_skipped(model):
    silent = batch(2, 20, 5, ignored=20)
    mixed = replace(
        BATCHES[0],
        input_ids=torch.cat((silent.input_ids, BATCHES[0].input_ids)),
        targets=torch.cat((silent.targets, BATCHES[0].targets)),
        sample_index=torch.arange(5),
    )
    rule = exit_rule(RULE, model)
    expected = evaluate_exits(model, BATCHES[:1], rule, DEPTH)
    assert evaluate_exits(model, [mixed, silent], rule, DEPTH) == expected


def test_every_loop_is_a_forward_call_of_that_depth(model):
    ids, documents = BATCHES[2].input_ids, BATCHES[2].document_ids
    with torch.no_grad():
        ctx = model.context(ids, document_ids=documents)
        for t, h in model.unroll(ids, 3, ctx):
            expected = model(ids, t + 1, document_ids=documents)
            torch.testing.assert_close(model.logits(h, ctx), expected)


def test_scores_do_not_depend_on_the_chunk():
    hidden, weight, targets = torch.randn(7, 5), torch.randn(11, 5), torch.arange(7)
    head = nn.Linear(5, 11, bias=False)
    head.weight = nn.Parameter(weight)
    loss, right = token_scores(hidden, head, targets, chunk=3)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, targets, reduction="none"))
    assert torch.equal(right, (hidden @ weight.T).argmax(-1) == targets)


def test_units_and_time(model):
    rule = exit_rule(RULE, model)
    report = evaluate_exits(model, BATCHES, rule, 2, bytes_per_token=4.0, repeats=2)
    for row in report.rows:
        assert row.bits_per_byte == pytest.approx(row.loss / 4 / math.log(2))
        assert row.seconds is not None
        assert 0 < row.seconds < 60
    assert json.loads(json.dumps(asdict(report)))["tokens"] == TOKENS
    untimed = evaluate_exits(model, BATCHES[:1], rule)
    assert untimed.n_loops == model.cfg.max_loop_iters
    assert all(row.seconds is None and row.bits_per_byte is None for row in untimed.rows)


def test_the_model_is_not_modified():
    model = busy(OpenMythos(config(dropout=0.5))).train()
    rule = exit_rule(RULE, model)
    first = evaluate_exits(model, BATCHES, rule, 3)
    assert model.training
    assert first == evaluate_exits(model, iter(BATCHES), rule, 3)


def test_invalid_arguments_are_rejected(model):
    rule = exit_rule(RULE, model)
    with pytest.raises(ConfigError, match="needs a looped model"):
        evaluate_exits(DenseTransformer(config()), BATCHES, rule)
    with pytest.raises(DataError, match="nothing to evaluate on"):
        evaluate_exits(model, [batch(1, 4, 0, ignored=4)], rule)
    for wrong in ({"n_loops": 0}, {"repeats": -1}):
        with pytest.raises(ConfigError):
            evaluate_exits(model, BATCHES, rule, **wrong)
