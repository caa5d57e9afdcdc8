"""Six faults, planted in a small model that trains, are named; healthy training is left alone."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from experiments.tasks import PermHop
from open_mythos import Depth, LoopTrace, MythosConfig, OpenMythos
from open_mythos.model.exit_rules import exit_rule
from open_mythos.train import DepthConfig, DepthPlan
from open_mythos.train.loss import count_targets, next_token_loss
from open_mythos.train.monitoring.alarms import (
    REMEDIES,
    LoopWatchdog,
    Thresholds,
    first_judged_step,
    loop_losses,
    relative_gap,
)
from open_mythos.train.monitoring.metrics import LoopFigures, exit_histogram

TASK = PermHop(entities=5, relations=3)
HOPS, MEAN, DEEPEST = 3, 4, 8
CONFIG = MythosConfig(
    vocab_size=8, dim=32, n_heads=2, n_kv_heads=2, max_seq_len=16, max_loop_iters=6,
    prelude_layers=1, coda_layers=1, attn_type="gqa", n_experts=0, ffn_dim=64, lora_rank=0,
    rope_theta=10.0,
)  # fmt: skip
EXPERTS = replace(CONFIG, n_experts=4, n_experts_per_tok=2, n_shared_experts=1, expert_dim=32)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads of so small a model mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Run:
    """A plain training loop that looks at every step, as a trainer with ``log_every=1`` does."""

    def __init__(self, cfg: MythosConfig, dog: LoopWatchdog | None = None) -> None:
        torch.manual_seed(0)
        self.model = OpenMythos(cfg)
        self.dog = dog or LoopWatchdog(cfg)
        self.plan = DepthPlan(DepthConfig(plan="poisson", mean=MEAN, max_loops=DEEPEST), 0)
        weights = [p for name, p in self.model.named_parameters() if "halting" not in name]
        self.optimizer = torch.optim.AdamW(weights, lr=5e-3, betas=(0.9, 0.98), weight_decay=0.1)
        self.loss, self.step = math.nan, 0

    def train(self, steps: int, exits: list[int] | None = None, batch: int = 32) -> list:
        """Alarms of ``steps`` more steps."""
        raised = []
        for step in range(self.step, self.step + steps):
            data = TASK.batch(step, global_batch=batch, hops=HOPS)
            trace = LoopTrace(keep_correlation=True)
            loss = next_token_loss(
                self.model, data.input_ids, data.targets, step_tokens=count_targets(data.targets),
                step_sequences=batch, depth=Depth(self.plan.depths(step, data.sample_index)),
                trace=trace,
            ).total  # fmt: skip
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            if norm.isfinite():
                self.optimizer.step()
                self.model.update_router_bias(trace, 1e-2)
            self.optimizer.zero_grad()
            self.loss, self.step = loss.item(), step + 1
            gap = None
            if norm.isfinite():
                gap = relative_gap(*loop_losses(self.model, data.split(4)[0], MEAN))
            figures = LoopFigures.of(trace)
            raised += self.dog.observe(self.step, figures, loop_gap=gap, exits=exits)
        return raised


@pytest.mark.parametrize("cfg", [CONFIG, EXPERTS], ids=["dense", "experts"])
def test_healthy_training_raises_nothing(cfg):
    """It learns the task and uses its loops; no figure leaves its bounds for long."""
    run = Run(cfg, LoopWatchdog(cfg, start=first_judged_step(120, 10)))
    assert run.train(120) == []
    assert run.loss < 0.5 < math.log(TASK.entities)
    one, deep = loop_losses(run.model, TASK.batch(0, global_batch=64, hops=HOPS), MEAN)
    assert one > 1.5 * deep


def planted(fault: str) -> Run:
    """A model that has trained for five healthy steps and then gets a fault."""
    rank = 2 if fault in ("state_explosion", "not_finite") else 0
    run = Run(replace(EXPERTS if fault == "one_expert" else CONFIG, lora_rank=rank))
    assert run.train(5) == []
    block = run.model.recurrent
    with torch.no_grad():
        if fault == "state_collapse":
            # attention sees all alike, and what it finds drowns what the tokens were
            attention = block.blocks[0].attn
            attention.q_proj.weight.zero_()
            attention.out_proj.weight.normal_(std=30.0)
        elif fault == "state_explosion":
            block.lora.up[2].normal_(std=100.0)  # the adapter of the third loop
        elif fault == "recurrence_ignored":
            block.injection.log_A.fill_(30.0)  # A is 0: every loop begins from B e alone
        elif fault == "not_finite":
            block.lora.up[2] = math.nan
        elif fault == "one_expert":
            block.blocks[0].ffn.router_bias[2] = 50.0
    return run


@pytest.mark.parametrize(
    ("fault", "loop"),
    [
        ("state_collapse", None), ("state_explosion", 3), ("recurrence_ignored", None),
        ("not_finite", 3), ("one_expert", None),
    ],
)  # fmt: skip
def test_a_planted_fault_is_named_within_ten_looks(fault, loop):
    run = planted(fault)
    raised = run.train(10)
    assert [alarm.name for alarm in raised] == [fault]
    (alarm,) = raised
    assert 5 < alarm.step <= 15
    assert alarm.fix == REMEDIES[fault]
    if loop is not None:
        assert alarm.loop == loop
    assert [name.partition("/")[0] for name in run.dog.active] == [fault]


@pytest.mark.parametrize(("bias", "exits"), [(30.0, 1), (-30.0, DEEPEST)])
def test_stuck_halting_is_named(bias, exits):
    """The gate of the real exit rule always stops, or never."""
    run = Run(CONFIG)
    gate = run.model.recurrent.halting.gate
    ids = TASK.batch(0, global_batch=8, hops=HOPS).input_ids

    def histogram() -> list[int]:
        trace = LoopTrace()
        rule = exit_rule("gate:0.9", run.model)
        run.model.eval()(ids, n_loops=DEEPEST, exit_rule=rule, trace=trace)
        return exit_histogram(trace.exits, DEEPEST)

    with torch.no_grad():
        gate.bias.fill_(0.0)
        gate.weight.normal_()
    assert run.train(1, exits=histogram()) == []
    with torch.no_grad():
        gate.bias.fill_(bias)
    stuck = histogram()
    assert stuck[exits - 1] == sum(stuck) == ids.numel()
    (alarm,) = run.train(1, exits=stuck)
    assert (alarm.name, alarm.value) == ("halting_stuck", exits)


def figures(norms=(1.0, 1.2), correlation=(0.1, 0.1), rows=(8, 8), load=None) -> LoopFigures:
    """What a step of two loops measured."""
    means = {"state_norm": list(norms), "delta_norm": list(norms)}
    if correlation is not None:
        means["correlation"] = list(correlation)
    loads = {} if load is None else {1: torch.tensor([load], dtype=torch.float64)}
    return LoopFigures(list(rows), means, loads)


def names(alarms) -> list[str]:
    return [alarm.name for alarm in alarms]


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("state_explosion", {"norms": (1.0, 10.0)}, {"norms": (1.0, 10.1)}),
        ("state_collapse", {"correlation": (0.1, 0.849)}, {"correlation": (0.1, 0.851)}),
    ],
)
def test_bounds_patience_and_clearing(name, good, bad):
    dog = LoopWatchdog(CONFIG)
    assert [names(dog.observe(step, figures(**good))) for step in range(9)] == [[]] * 9
    # four bad looks, a good one, then five: the good one starts the count again
    looks = [bad] * 4 + [good] + [bad] * 6 + [good] + [bad] * 5
    raised = [names(dog.observe(step, figures(**look))) for step, look in enumerate(looks)]
    assert [step for step, found in enumerate(raised) if found] == [9, 16]
    assert raised[9] == raised[16] == [name]


@pytest.mark.parametrize("gap", [0.0, 0.00099, -0.00099, math.nan])
def test_loops_without_effect(gap):
    dog = LoopWatchdog(CONFIG)
    found = [names(dog.observe(step, figures(), loop_gap=gap)) for step in range(5)]
    assert found == [[]] * 4 + [["recurrence_ignored"]]
    assert dog.observe(5, figures(), loop_gap=None) == []
    assert dog.active == ["recurrence_ignored"]
    for effect in (0.0011, -0.5):
        assert dog.observe(6, figures(), loop_gap=effect) == []
        assert dog.active == []


def test_what_a_beginner_shows_is_judged_late():
    dog, ill = LoopWatchdog(CONFIG, start=100), {"correlation": (0.99, 0.99)}
    early = [dog.observe(step, figures(**ill), loop_gap=0.0) for step in range(90, 100)]
    assert early == [[]] * 10
    late = [names(dog.observe(step, figures(**ill), loop_gap=0.0)) for step in range(100, 105)]
    assert sorted(late[4]) == ["recurrence_ignored", "state_collapse"]
    assert late[:4] == [[]] * 4
    assert first_judged_step(1000, 100) == 200
    assert first_judged_step(1000, 300) == 300
    assert first_judged_step(100_000, 300) == 2000


def test_loops_that_few_sequences_reach_do_not_count_as_collapse():
    dog = LoopWatchdog(CONFIG)
    for step in range(9):
        assert dog.observe(step, figures(correlation=(0.2, 1.0), rows=(8, 3))) == []


def test_a_state_of_zero_has_collapsed():
    dog, empty = LoopWatchdog(CONFIG), figures(norms=(0.0, 0.0), correlation=(0.0, 0.0))
    assert names([a for step in range(5) for a in dog.observe(step, empty)]) == ["state_collapse"]


def test_uneven_experts_after_two_hundred_steps():
    """A starved one and a crowded one; what happens every ten steps needs twenty looks."""
    cfg = replace(EXPERTS, n_experts=8, n_experts_per_tok=1)
    for load in ([0, 14, 14, 14, 14, 14, 15, 15], [510, 70, 70, 70, 70, 70, 70, 70]):
        dog, load = LoopWatchdog(cfg), [100 * x for x in load]
        found = {s: names(dog.observe(s, figures(load=load))) for s in range(10, 311, 10)}
        assert {step: each for step, each in found.items() if each} == {210: ["uneven_experts"]}
    even = [100 * x for x in (2, 14, 14, 14, 14, 14, 14, 14)]
    dog = LoopWatchdog(cfg)
    assert not any(dog.observe(step, figures(load=even)) for step in range(0, 1000, 10))


def test_few_choices_prove_nothing():
    dog = LoopWatchdog(replace(EXPERTS, n_experts=8, n_experts_per_tok=1))
    few = figures(load=[0, 10, 10, 10, 10, 10, 10, 10])
    assert not any(dog.observe(step, few) for step in range(0, 1000, 10))


def test_a_look_at_what_is_broken_clears_nothing():
    dog, long = LoopWatchdog(CONFIG), figures(norms=(2.0, 30.0))
    (alarm,) = [alarm for step in range(5) for alarm in dog.observe(step, long)]
    assert (alarm.name, alarm.value, alarm.loop) == ("state_explosion", 15.0, 2)
    (alarm,) = dog.observe(5, figures(norms=(2.0, math.nan), correlation=(0.1, math.nan)))
    assert (alarm.name, alarm.loop) == ("not_finite", 2)
    assert dog.active == ["not_finite", "state_explosion"]
    assert dog.observe(6, long) == []
    assert dog.active == ["state_explosion"]


def test_all_experts_chosen_is_not_one_expert():
    dog = LoopWatchdog(replace(EXPERTS, n_experts=2, n_experts_per_tok=2))
    assert not any(dog.observe(s, figures(load=[500, 500])) for s in range(0, 1000, 10))


def test_nothing_is_said_about_depth_one():
    dog = LoopWatchdog(CONFIG)
    assert dog.observe(1, figures(), exits=[40]) == []
    assert dog.observe(2, figures(), exits=[0, 0]) == []
    assert dog.observe(3, LoopFigures([], {}, {})) == []


def test_thresholds_are_the_callers():
    dog = LoopWatchdog(CONFIG, Thresholds(growth=1.1, patience=1))
    (alarm,) = dog.observe(7, figures())
    assert (alarm.name, alarm.step, alarm.loop, alarm.value) == ("state_explosion", 7, 2, 1.2)
    assert "to do" in str(alarm)
    assert json.loads(json.dumps(alarm.to_dict())) == alarm.to_dict()


@pytest.mark.parametrize("cut", range(0, 12, 2))
def test_resumed_equals_uninterrupted(cut):
    looks = [figures(norms=(1.0, x)) for x in (1, 11, 11, 11, 11, 11, 11, 1, 11, 11, 11, 11, 11)]
    whole = LoopWatchdog(CONFIG)
    expected = [whole.observe(step, look) for step, look in enumerate(looks)]
    assert sum(map(len, expected)) == 2
    first, second = LoopWatchdog(CONFIG), LoopWatchdog(CONFIG)
    found = [first.observe(step, look) for step, look in enumerate(looks[:cut])]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [second.observe(step, look) for step, look in enumerate(looks[cut:], start=cut)]
    assert found == expected
    assert second.state_dict() == whole.state_dict()


def test_probing_leaves_the_model_as_it_is():
    model = OpenMythos(CONFIG).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = TASK.batch(0, global_batch=4, hops=HOPS)
    one, deep = loop_losses(model, batch, MEAN)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for depth, loss in ((1, one), (MEAN, deep)):
        logits = model.eval()(batch.input_ids, n_loops=depth).flatten(0, 1)
        expected = nn.functional.cross_entropy(logits, batch.targets.flatten())
        assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert relative_gap(3.0, 2.0) == 0.5
