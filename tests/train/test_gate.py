"""Stage two trains the gate on the frozen trajectory, and nothing else."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from helpers import random_ids, small_config, small_model

from experiments.tasks import PermHop
from open_mythos import ConfigError, DenseTransformer
from open_mythos.data import Batch
from open_mythos.errors import DataError
from open_mythos.model.exit_rules import exit_rule
from open_mythos.model.layers.halting import ACTHalting, exit_loops
from open_mythos.train import GATE_TARGETS, GateConfig, gate, train_gate
from open_mythos.train.gate import (
    Trajectory,
    calibration_error,
    marginal_gain,
    remaining_gain,
    trajectory,
)

QUICK = GateConfig(n_loops=5, positions=60, steps=40, step_positions=32)
LATE = torch.tensor([2.8] * 4 + [0.01] * 4).unsqueeze(1)
"""(8, 1) losses of an answer that takes five loops to appear at all."""


def batch(rows: int = 4, length: int = 9, seed: int = 0) -> Batch:
    ids = random_ids(rows, length + 1, seed)
    targets = ids[:, 1:].clone()
    targets[:, :2] = -100
    return Batch(ids[:, :-1], targets, None, torch.arange(rows))


class TestTargets:
    def test_gains_of_a_falling_and_rising_loss(self):
        loss = torch.tensor([3.0, 2.0, 2.5, 1.5, 1.75]).unsqueeze(1)
        assert marginal_gain(loss)[:, 0].tolist() == [1.0, 0.0, 1.0, 0.0]
        assert remaining_gain(loss)[:, 0].tolist() == [1.5, 0.5, 1.0, 0.0]

    def test_one_loop_ahead_sees_nothing_of_a_late_answer(self):
        assert marginal_gain(LATE)[:, 0].tolist() == pytest.approx([0, 0, 0, 2.79, 0, 0, 0])
        assert remaining_gain(LATE)[:, 0].tolist() == pytest.approx([2.79] * 4 + [0] * 3)

    @pytest.mark.parametrize(("target", "leaves_after"), [("remaining", 5), ("marginal", 1)])
    def test_where_the_trained_gate_leaves(self, target, leaves_after, monkeypatch):
        """States that tell everything, so that the target alone decides."""
        positions = 50
        states = torch.eye(8).unsqueeze(1).expand(8, positions, 8).contiguous()
        path = Trajectory(states, LATE.expand(8, positions).contiguous())
        monkeypatch.setattr(gate, "trajectory", lambda *_, **__: path)
        model = small_model(dim=8, n_heads=2, qk_rope_head_dim=2)
        report = train_gate(model, [], GateConfig(target=target, steps=300, lr=0.2))
        left = exit_loops(model.recurrent.halting(states), 0.5) + 1
        assert left.tolist() == [leaves_after] * positions
        (row,) = [each for each in report.thresholds if each.threshold == 0.5]
        assert (row.mean_loops, row.finished) == (leaves_after, float(target == "remaining"))
        assert row.loss == pytest.approx(LATE[leaves_after - 1].item())
        assert report.loss_by_loop == pytest.approx(LATE[:, 0].tolist())

    def test_the_least_probability_of_going_on(self):
        """With nothing to gain the target is sigmoid(-slope margin), not 0: it takes patience."""
        nothing = GateConfig()
        wanted = torch.sigmoid(torch.tensor(-nothing.slope * nothing.margin))
        flat = torch.full((4, 3), 1.0)
        assert torch.allclose(gate._continue_target(flat, nothing), wanted)
        assert wanted == pytest.approx(0.438, abs=1e-3)


class TestTrajectory:
    def test_losses_are_those_of_forward_calls(self, model):
        whole = batch()
        path = trajectory(model, [whole], 4, 1000)
        asked = whole.targets != -100
        assert path.states_LND.shape == (4, int(asked.sum()), model.cfg.dim)
        for depth in range(1, 5):
            with torch.no_grad():
                logits = model(whole.input_ids, depth)[asked]
            expected = F.cross_entropy(logits, whole.targets[asked], reduction="none")
            torch.testing.assert_close(path.loss_LN[depth - 1], expected)

    def test_an_endless_stream_is_read_as_far_as_needed(self, model):
        read = itertools.count()
        stream = (batch(seed=next(read)) for _ in itertools.count())
        path = trajectory(model, stream, 2, 60)
        assert path.loss_LN.shape == (2, 60)
        assert next(read) == 3  # 28 targets each

    def test_documents_stay_apart(self, model):
        both = batch(1, 8)
        documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
        second = Batch(both.input_ids[:, 4:], both.targets[:, 4:], None, both.sample_index)
        packed = trajectory(model, [replace(both, document_ids=documents)], 3, 100)
        alone = trajectory(model, [second], 3, 100)
        torch.testing.assert_close(packed.loss_LN[:, -4:], alone.loss_LN)

    def test_too_little_and_what_is_not_finite_are_refused(self):
        empty = replace(batch(), targets=torch.full((4, 9), -100))
        with pytest.raises(DataError, match="too little"):
            trajectory(small_model(), [empty], 2, 10)
        broken = small_model()
        with torch.no_grad():
            broken.readout.weight.fill_(torch.nan)
        with pytest.raises(DataError, match="not finite"):
            trajectory(broken, [batch()], 2, 10)


class TestTraining:
    @pytest.mark.parametrize("attn_type", ["mla", "gqa"])
    def test_everything_else_stays_bit_for_bit(self, attn_type):
        model = small_model(attn_type).train()
        model.recurrent.halting.requires_grad_(False)  # as a trainer leaves it
        before = {name: value.clone() for name, value in model.state_dict().items()}
        train_gate(model, [batch(seed=i) for i in range(3)], QUICK)
        after = model.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"recurrent.halting.gate.weight", "recurrent.halting.gate.bias"}
        assert model.training
        assert not any(p.grad is not None for p in model.parameters())
        assert not model.recurrent.halting.gate.weight.requires_grad

    def test_a_function_of_its_seed(self):
        def trained(seed: int, start: int = 0) -> torch.Tensor:
            model = small_model()
            torch.manual_seed(start)
            torch.nn.init.normal_(model.recurrent.halting.gate.weight)
            train_gate(model, [batch(seed=i) for i in range(3)], replace(QUICK, seed=seed))
            return model.recurrent.halting.gate.weight.detach()

        assert torch.equal(trained(0), trained(0, start=1))  # whatever the gate was before
        assert not torch.equal(trained(0), trained(1))

    def test_the_gate_learns_and_the_report_says_so(self):
        model, task = small_model(vocab_size=24), PermHop(16, 8)
        stream = (task.batch(i, global_batch=16, hops=4) for i in itertools.count())
        config = GateConfig(n_loops=6, positions=400, steps=300)
        report = train_gate(model, stream, config)
        assert report.curve[0] == pytest.approx(torch.tensor(2.0).log().item())
        assert len(report.curve) == 300
        assert sum(report.curve[-20:]) / 20 < report.curve[0] - 0.1
        assert report.positions == 320
        loops = [row.mean_loops for row in report.thresholds]
        assert loops == sorted(loops)
        assert 1 < loops[-1] <= 6
        assert 0 < report.calibration_error < 0.25
        assert json.loads(json.dumps(asdict(report)))["target"] == "remaining"
        assert len(report.loss_by_loop) == 6

    def test_the_exit_rule_uses_it(self):
        model = small_model()
        before = exit_rule("gate:0.9", model).gate.gate.bias.clone()
        train_gate(model, [batch(seed=i) for i in range(3)], QUICK)
        assert exit_rule("gate:0.9", model).gate.gate.bias != before

    @pytest.mark.parametrize(
        "wrong",
        [{"n_loops": 1}, {"target": "both"}, {"steps": 0}, {"positions": 0}, {"lr": 0.0},
         {"slope": float("nan")}, {"margin": -0.1}, {"step_positions": 1.5}, {"seed": -1}],
        ids=str,
    )  # fmt: skip
    def test_a_field_out_of_range_is_refused(self, wrong):
        with pytest.raises(ConfigError) as caught:
            train_gate(small_model(), [batch()], GateConfig(**wrong))
        assert next(iter(wrong)) in str(caught.value)

    def test_an_unknown_target_names_the_known_ones(self):
        with pytest.raises(ConfigError) as caught:
            GateConfig(target="margnal").validate()
        assert all(name in str(caught.value) for name in GATE_TARGETS)

    def test_a_dense_model_is_refused(self):
        dense = DenseTransformer.like(small_config())
        with pytest.raises(ConfigError, match="OpenMythos"):
            train_gate(dense, [batch()], QUICK)


def test_calibration_error_is_the_distance_within_bins():
    """Two halves of the positions: one in which going on pays, and one in which it does not."""
    config = GateConfig(slope=50.0, margin=1.0)
    loss = torch.tensor([[9.0, 1.0], [1.0, 1.0]])  # gains 8 and 0: targets 1 and 0
    states = torch.tensor([[[1.0], [-1.0]], [[0.0], [0.0]]])
    path, rule = Trajectory(states, loss), ACTHalting(1)

    def error(weight: float, bias: float) -> float:
        with torch.no_grad():
            rule.gate.weight.fill_(weight)
            rule.gate.bias.fill_(bias)
        return calibration_error(rule, path, config)

    assert error(-50.0, 0.0) == pytest.approx(0.0, abs=1e-6)
    assert error(50.0, 0.0) == pytest.approx(1.0)
    assert error(0.0, 0.0) == pytest.approx(0.0, abs=1e-6)  # says 1/2, and half of them pay
    assert error(0.0, 50.0) == pytest.approx(0.5)  # always stops


class TestStuck:
    @pytest.mark.parametrize(
        ("flat_from", "margin", "mean"),
        [(16, 0.005, 16), (0, 10.0, 1), (5, 0.005, None)],
        ids=["never stops", "always stops at once", "healthy"],
    )
    def test_a_gate_that_is_stuck_raises_the_alarm(
        self, flat_from, margin, mean, monkeypatch, caplog
    ):
        """The loss falls by a nat a loop, until it is flat; states tell the loop."""
        loss = -torch.arange(16.0).clamp_max(flat_from).unsqueeze(1)
        states = torch.eye(16).unsqueeze(1).expand(16, 50, 16).contiguous()
        path = Trajectory(states, loss.expand(16, 50).contiguous())
        monkeypatch.setattr(gate, "trajectory", lambda *_, **__: path)
        model = small_model(dim=16, n_heads=2, qk_rope_head_dim=2)
        report = train_gate(model, [], GateConfig(steps=300, lr=0.2, margin=margin))
        found = [(alarm.name, alarm.value, alarm.step) for alarm in report.alarms]
        assert found == ([] if mean is None else [("halting_stuck", mean, 300)])
        assert ("halting_stuck" in caplog.text) == (mean is not None)
        json.dumps(asdict(report))
