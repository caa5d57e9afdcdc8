"""C4: ranks and minimal depths are right, the quick cell runs, and the verdict follows the mark."""

from __future__ import annotations

import math

import pytest
import torch

from experiments import c4_halting as c4
from experiments.c1_depth.chain_recipe import recipe
from experiments.c4_halting import chains
from experiments.c4_halting.act import measure_act, mixture, train_act
from experiments.c4_halting.answer import fewest_loops
from experiments.c4_halting.cells import ACT, CHAINS, TEXT
from experiments.c4_halting.points import ordering, shallowest, spearman
from experiments.claim import (
    DOES_NOT_HOLD,
    HOLDS,
    HOLDS_IN_PART,
    Cell,
    Record,
)
from open_mythos.data import Batch
from open_mythos.model.mythos import OpenMythos
from open_mythos.train import RunConfig, build_model


class TestRanks:
    def test_order_is_all_that_counts(self):
        assert spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)
        assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)

    def test_a_known_value(self):
        # d = 0, 1, 1, 1, 1: 1 - 6 * 4 / (5 * 24)
        assert spearman([1, 2, 3, 4, 5], [1, 3, 2, 5, 4]) == pytest.approx(0.8)

    def test_ties_share_their_rank(self):
        # ranks 1.5 1.5 3 4 against 1 2 3 4
        a, b = [-1.0, -1.0, 0.5, 1.5], [-1.5, -0.5, 0.5, 1.5]
        expected = sum(x * y for x, y in zip(a, b, strict=True))
        expected /= math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
        assert spearman([5, 5, 6, 7], [1, 2, 3, 4]) == pytest.approx(expected)

    def test_what_is_constant_orders_nothing(self):
        assert spearman([3, 3, 3], [1, 2, 3]) == 0

    def test_the_entity_is_no_question(self):
        ids = torch.zeros(2, 4, dtype=torch.long)
        batch = Batch(ids, ids, None, torch.arange(2))
        assert ordering(torch.tensor([[9, 1, 2, 3]] * 2), batch) == pytest.approx(1)


def test_fewest_loops():
    static = [0.2, 0.6, 0.9, 0.8, 0.95]
    assert [fewest_loops(static, x) for x in (0.1, 0.6, 0.61, 0.95, 1.0)] == [1, 2, 3, 5, 5]


def test_the_shallowest_good_enough():
    points = [{"accuracy": 0.9, "loops": 3.0}, {"accuracy": 0.99, "loops": 8.0},
              {"accuracy": 0.995, "loops": 7.0}]  # fmt: skip
    assert shallowest(points, 0.98) == points[2]
    assert shallowest(points, 0.999) is None


def test_questions_are_those_with_the_most_held_out_prefixes():
    asked = chains.questions(10, 20, 500)
    counts = (asked.targets >= 0).sum(1)
    everything = (chains.TASK.batch(0, global_batch=500, hops=10, held_out=True).targets >= 0).sum(
        1
    )
    assert counts.tolist() == everything.sort(descending=True).values[:20].tolist()
    ids = asked.input_ids.numpy()
    answers = torch.from_numpy(chains.TASK.answers(ids[:, 0], ids[:, 1:] - 16))
    labelled = asked.targets[:, 1:] >= 0
    assert torch.equal(asked.targets[:, 1:][labelled], answers[labelled])


def recipe_model() -> OpenMythos:
    """The quick recipe's model with noise on every weight."""
    built = build_model(recipe(quick=True))
    assert isinstance(built, OpenMythos)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in built.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return built.eval()


@pytest.fixture(scope="module")
def model() -> OpenMythos:
    return recipe_model()


def test_the_oracle_leaves_when_the_answer_is_right_for_good(model, monkeypatch):
    """Three questions: right from loop 2 on, at loops 1, 3 and 4, and never."""
    right = torch.tensor([[0, 1, 0], [1, 0, 0], [1, 1, 0], [1, 1, 0]], dtype=torch.bool)
    seen = []

    def told(model, batches, n_loops, rules):
        seen.append(rules[0].depths_BT.tolist())
        return run_exits(model, batches, n_loops, rules)

    run_exits = chains.run_exits
    every = torch.cat((torch.zeros(4, 1, dtype=torch.bool), right), 1).unsqueeze(1)
    monkeypatch.setattr(chains, "answered", lambda *_: every)
    monkeypatch.setattr(chains, "run_exits", told)
    found = chains.oracle(model, chains.questions(3, 1, 200), 4, [0, 1])
    assert seen == [[[2, 2, 3, 4]], [[3, 3, 4, 4]]]
    assert [row["loops"] for row in found] == [11 / 4, 14 / 4]


def test_static_depths_are_forward_calls(model):
    test = chains.questions(6, 16, 400)
    found = chains.static_depths(model, test, 3)
    asked = test.targets >= 0
    for loops, share in enumerate(found, start=1):
        with torch.no_grad():
            said = model(test.input_ids, loops).argmax(-1)
        assert share == pytest.approx((said == test.targets)[asked].float().mean().item())


class TestActMixing:
    def test_the_mixture_is_that_of_the_states(self, model):
        batch = chains.questions(4, 4, 100)
        hidden, cost, loops = mixture(model, batch, 1)
        with torch.no_grad():
            torch.testing.assert_close(model.head(hidden), model(batch.input_ids, 1))
        assert cost.flatten().tolist() == [2.0] * 20  # one loop, and all of it is remainder
        assert loops.flatten().tolist() == [1] * 20

    def test_every_loop_counts_until_the_threshold(self):
        model = recipe_model()
        with torch.no_grad():
            model.recurrent.halting.gate.weight.zero_()
            model.recurrent.halting.gate.bias.fill_(math.log(0.4 / 0.6))
        asked = chains.questions(4, 4, 100)
        assert mixture(model, asked, 9)[2].unique().tolist() == [3]  # 0.4 + 0.4 + the remainder
        assert mixture(model, asked, 2)[2].unique().tolist() == [2]

    def test_training_moves_the_gate_and_measures(self):
        run = recipe(quick=True)
        trained = train_act(run, ponder=0.01, bias=-2.0)
        gate = trained.recurrent.halting.gate
        assert gate.weight.any()
        assert gate.bias.item() != -2.0
        few, many = measure_act(trained, chains.questions(4, 8, 200), [2, 6])
        assert few["loops"] <= 2 < many["loops"] <= 6
        assert all(0 <= each["left"] <= 1 for each in (few, many))


def test_quick_cell_runs(place):
    (cell,) = c4.cells("quick")
    figures = c4.run_cell(cell, place)
    assert len(figures["static"]) == 6
    assert [point["spec"] for point in figures["points"]] == ["gate:0.9", "change:0.1"]
    for point in figures["points"]:
        assert 1 <= point["loops"] <= 6
        assert point["random"]["loops"] == pytest.approx(point["loops"])
        assert -1 <= point["spearman"] <= 1
    assert figures["seconds"]["full"] > 0
    assert figures["oracle"][0]["delay"] == 1
    assert set(figures["gates"]["gate, remaining"]["calibration"]) == {"trained", "unseen"}


def test_text_cell_runs(place):
    (long,) = [cell for cell in c4.cells("cpu") if cell.name == "text-seed10"]
    s = long.settings
    train = {"steps": 4, "seq_len": 16, "global_batch": 4, "warmup_steps": 1, "device": "cpu"}
    run = s["run"] | {"model": s["run"]["model"] | {"dim": 32, "n_heads": 2, "n_kv_heads": 2},
                      "train": train}  # fmt: skip
    settings = s | {
        "run": run, "val_windows": 2, "loops": 4, "gates": {"gate, remaining": "remaining"},
        "gate": {"n_loops": 4, "positions": 64, "steps": 5},
        "thresholds": ["gate:0.9"], "rules": {"stable token": ["stable:1"]},
    }  # fmt: skip
    figures = c4.run_cell(Cell(TEXT, 0, settings), place)
    assert len(figures["static"]) == 4
    assert [point["spec"] for point in figures["points"]] == ["gate:0.9", "stable:1"]
    assert all("spearman" not in point for point in figures["points"])


def test_settings_are_valid():
    cells = c4.cells("cpu")
    assert {cell.arm for cell in cells} == {CHAINS, ACT, TEXT}
    for cell in cells:
        RunConfig.from_dict(cell.settings["run"])


def point(
    rule: str, spec: str, *, loops: float, accuracy: float, random: float, rho: float
) -> dict:
    return {
        "rule": rule, "spec": spec, "loops": loops, "accuracy": accuracy, "loss": 1.0,
        "computed": loops / 20, "spearman": rho,
        "random": {"loops": loops, "accuracy": random, "loss": 1.1},
        "loops_by_hop": [float(hop) for hop in range(1, 11)],
    }  # fmt: skip


def records(recorded, gate: dict, change: dict, worst_random: float = 0.5) -> list[Record]:
    """What came of a gate and a criterion whose figures are given; static depth needs 20 loops."""
    found = []
    about = {"calibration": {"trained": 0.05, "unseen": 0.15}, "position_shift": 1.0}
    gates = {"gate, remaining": about}
    for cell in c4.cells("cpu"):
        if cell.arm == CHAINS:
            random = worst_random if cell.seed == 12 else 0.5
            points = [
                point("gate, remaining", "gate:0.9", random=0.5, **gate),
                point("state change", "change:0.1", random=0.3, loops=3.0, accuracy=0.4, rho=0.2),
                point("state change", "change:0.05", random=random, **change),
            ]
            static = [min(0.99, 0.0495 * loops) for loops in range(1, 25)]
            oracle = [{"delay": 0, "loops": 5.0, "accuracy": 0.2, "loss": 1.0},
                      {"delay": 6, "loops": 11.0, "accuracy": 0.98, "loss": 1.0}]  # fmt: skip
            figures = {"static": static, "points": points, "gates": gates, "oracle": oracle,
                       "seconds": {"full": 2.0, "state change": 1.5}}  # fmt: skip
        elif cell.arm == ACT:
            allowed = [{"allowed": n, "accuracy": 0.7, "left": 0.6, "loops": 6.0, "spearman": 0.9}
                       for n in (10, 24)]  # fmt: skip
            figures = {"static": [0.5] * 24, "allowed": allowed}
        else:
            points = [
                point("gate, remaining", "gate:0.9", loops=2.0, accuracy=0.5, random=0.5, rho=0)
            ]
            figures = {"static": [1.9, 1.8, 1.85], "points": points}
        found.append(recorded(cell, **figures))
    return found


ORDERED = {"loops": 12.0, "accuracy": 0.9, "rho": 0.95}
UNORDERED = {"loops": 12.0, "accuracy": 0.9, "rho": 0.85}
CHEAP = {"loops": 13.9, "accuracy": 0.987, "rho": 0.97}
DEAR = {"loops": 14.1, "accuracy": 0.987, "rho": 0.97}
WRONG = {"loops": 10.0, "accuracy": 0.98, "rho": 0.97}


@pytest.mark.parametrize(
    ("gate", "change", "verdict"),
    [
        (ORDERED, CHEAP, HOLDS),
        (UNORDERED, CHEAP, HOLDS_IN_PART),  # a rule that is not learned does not order
        (ORDERED, DEAR, HOLDS_IN_PART),
        (ORDERED, WRONG, HOLDS_IN_PART),
        (UNORDERED, DEAR, DOES_NOT_HOLD),
    ],
)
def test_verdicts(recorded, gate, change, verdict):
    assert c4.summarise(records(recorded, gate, change)).verdict == verdict


def test_random_exits_must_be_worse_in_every_seed(recorded):
    found = records(recorded, ORDERED, CHEAP, worst_random=0.99)
    assert c4.summarise(found).verdict == HOLDS_IN_PART


def test_what_is_said_and_drawn(recorded, tmp_path):
    summary = c4.summarise(records(recorded, ORDERED, CHEAP))
    assert summary.key == "rho 0.95 (gate); 70% of static loops at 0.3 points lost"
    assert "(gate, remaining, gate:0.9)" in summary.sentence
    assert "best static depth is 2 loops" in summary.sentence
    rows = {row[0]: row for row in summary.rows}
    assert rows["state change"][1] == "change:0.05"  # the shallow setting loses too much
    assert rows["state change"][-1] == "75%"
    assert rows["gate, remaining"][-1] == "-"
    assert {len(row) for row in summary.rows} == {len(summary.head)}
    c4.plot(summary, tmp_path / "c4.png")
    assert (tmp_path / "c4.png").stat().st_size > 10_000
