"""The depth sweep equals one forward call per depth."""

import json
import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from open_mythos.data.batch import IGNORE_INDEX
from open_mythos.errors import ConfigError, DataError
from open_mythos.evaluation import evaluate_depths
from open_mythos.model.dense import DenseTransformer
from open_mythos.model.mythos import OpenMythos

from .small import BATCHES, TOKENS, VOCAB, batch, busy, config


def loss_of(model, batches, **depth) -> float:
    """Compute the mean loss from full logits of one forward call per batch."""
    total, count = 0.0, 0
    for each in batches:
        logits = model(each.input_ids, document_ids=each.document_ids, **depth)
        total += F.cross_entropy(
            logits.flatten(0, 1), each.targets.flatten(), reduction="sum"
        ).item()
        count += int((each.targets != IGNORE_INDEX).sum())
    return total / count


@pytest.mark.parametrize(
    "changes",
    [{}, {"attn_type": "gqa"}, {"initial_state": "normal"}, {"loop_embedding": True}],
    ids=str,
)
def test_every_depth_equals_a_forward_call(changes):
    model = busy(OpenMythos(config(**changes))).eval()
    rows = evaluate_depths(model, BATCHES, [6, 1, 3, 3])
    assert [row.depth for row in rows] == [1, 3, 6]
    for row in rows:
        with torch.no_grad():
            expected = loss_of(model, BATCHES, n_loops=row.depth)
        assert row.loss == pytest.approx(expected, rel=1e-6)
        assert row.tokens == TOKENS
    assert len({round(row.loss, 3) for row in rows}) == 3


def test_a_dense_model_has_one_row():
    model = busy(DenseTransformer(config())).eval()
    (row,) = evaluate_depths(model, BATCHES, [1, 2])
    with torch.no_grad():
        assert row.loss == pytest.approx(loss_of(model, BATCHES), rel=1e-6)
    assert row.depth is None


def test_loops_run_once_up_to_the_deepest(monkeypatch):
    model, steps = OpenMythos(config()), []
    step = model.recurrent.step

    def counting(h, drive, t, *rest):
        steps.append(t)
        return step(h, drive, t, *rest)

    monkeypatch.setattr(model.recurrent, "step", counting)
    evaluate_depths(model, BATCHES[:1], [5, 2, 4])
    assert steps == [0, 1, 2, 3, 4]


def test_units():
    (row,) = evaluate_depths(OpenMythos(config()), BATCHES, [2], bytes_per_token=4.0)
    assert row.bits_per_byte == pytest.approx(row.loss / 4 / math.log(2))
    assert row.perplexity == pytest.approx(math.exp(row.loss))
    assert json.loads(json.dumps(asdict(row)))["tokens"] == TOKENS


def test_a_uniform_model_has_the_entropy_of_the_vocabulary():
    model = OpenMythos(config())
    torch.nn.init.zeros_(model.head.weight)
    rows = evaluate_depths(model, BATCHES, [1, 3])
    assert [row.loss for row in rows] == pytest.approx([math.log(VOCAB)] * 2)
    assert rows[0].bits_per_byte is None


def test_the_model_is_not_modified():
    model = busy(OpenMythos(config(dropout=0.5))).train()
    first = evaluate_depths(model, BATCHES, [2])
    assert model.training
    assert first == evaluate_depths(model, iter(BATCHES), [2])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bfloat16_is_close_and_not_equal():
    model = busy(OpenMythos(config()))
    (exact,) = evaluate_depths(model, BATCHES, [3])
    (rounded,) = evaluate_depths(model, BATCHES, [3], dtype=torch.bfloat16)
    assert rounded.loss != exact.loss
    assert rounded.loss == pytest.approx(exact.loss, rel=0.03)


@pytest.mark.parametrize("depths", [[], [0], [1, -2], [1.5], [True]])
def test_invalid_depths_are_rejected(depths):
    with pytest.raises(ConfigError):
        evaluate_depths(OpenMythos(config()), BATCHES, depths)


@pytest.mark.parametrize("batches", [[], [batch(1, 4, 0, ignored=4)]])
def test_batches_without_targets_are_rejected(batches):
    with pytest.raises(DataError, match="nothing to evaluate on"):
        evaluate_depths(OpenMythos(config()), batches, [1])
