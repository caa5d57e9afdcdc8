"""Distillation: the divergence, its gradient, and a step that follows the teacher."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import small_model
from torch import nn

from open_mythos import Depth
from open_mythos.errors import ConfigError
from open_mythos.hub.pretrained import save_pretrained
from open_mythos.train import next_token_loss
from open_mythos.train.distillation import Teacher, divergence

IDS = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
TARGETS = IDS.roll(-1, 1)


def test_it_is_the_divergence_of_the_softened_distributions(monkeypatch):
    torch.manual_seed(0)
    student, teacher = nn.Linear(6, 11), nn.Linear(5, 11)
    hidden, taught = torch.randn(7, 6, requires_grad=True), torch.randn(7, 5)
    counts = torch.tensor([True] * 5 + [False, True])
    p = F.softmax(teacher(taught) / 2, -1)
    q = F.softmax(student(hidden) / 2, -1)
    expected = 4 * (p * (p / q).log()).sum(-1)[counts].sum()
    (gradient,) = torch.autograd.grad(expected, hidden)
    monkeypatch.setattr("open_mythos.train.distillation.chunk_rows", lambda *_: 3)
    found = divergence((student, hidden), (teacher, taught), counts, 2.0)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, hidden)[0], gradient)


def test_a_model_that_equals_its_teacher_has_no_divergence():
    model, teacher = small_model("gqa"), Teacher(small_model("gqa"))
    ctx = model.context(IDS)
    hidden = model.hidden(IDS, ctx, Depth(1))
    assert teacher.loss(hidden, model.head, IDS, TARGETS).abs() < 1e-5
    deeper = model.hidden(IDS, ctx, Depth(3))
    assert teacher.loss(deeper, model.head, IDS, TARGETS) > 1e-2


def test_the_loss_adds_it_and_reports_the_next_token_loss():
    model, teacher = small_model("gqa"), Teacher(small_model("gqa", seed=1), weight=0.7)
    arguments = {"step_tokens": TARGETS.numel(), "step_sequences": 2, "depth": Depth(2)}
    alone = next_token_loss(model, IDS, TARGETS, **arguments)
    both = next_token_loss(model, IDS, TARGETS, teacher=teacher, **arguments)
    assert both.nll == alone.nll
    hidden = model.hidden(IDS, model.context(IDS), Depth(2))
    extra = teacher.loss(hidden, model.head, IDS, TARGETS) / TARGETS.numel()
    torch.testing.assert_close(both.total, alone.nll + extra)
    both.total.backward()
    assert all(p.grad is None for p in teacher.model.parameters())


def test_another_vocabulary_is_refused(make_run, tmp_path):
    save_pretrained(small_model("gqa", vocab_size=32), tmp_path)
    run = make_run(train={"teacher": str(tmp_path)})
    with pytest.raises(ConfigError, match="another vocabulary"):
        Teacher.of(run, torch.device("cpu"))
    assert Teacher.of(make_run(), torch.device("cpu")) is None
