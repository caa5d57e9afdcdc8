"""Faults planted in a small model that trains raise their alarms; healthy training raises none."""

import json
import math
from contextlib import nullcontext
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from experiments.tasks import PermHop
from open_mythos import MythosConfig, OpenMythos
from open_mythos.train import DepthConfig, OptimConfig, RunConfig, TrainConfig, Trainer, build_model
from open_mythos.train.finite import DivergedError
from open_mythos.train.loop_summary import LoopSummary
from open_mythos.train.monitoring.alarms import (
    REMEDIES,
    LoopWatchdog,
    Thresholds,
    first_judged_step,
    halting_alarm,
    loop_losses,
    relative_gap,
)

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


class Programs:
    """Batches of the task; calls ``act(trainer)`` before the batch of a step."""

    def __init__(self, batch, at=None, act=None):
        self.step, self.batch, self.at, self.act = 0, batch, at, act

    def next_batch(self, step):
        if step == self.at:
            self.act(self.trainer)
        return TASK.batch(step, global_batch=self.batch, hops=HOPS)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Alarms:
    """Keeps the alarms of every line."""

    def __init__(self):
        self.raised, self.active, self.losses = [], [], []

    def log(self, step, metrics):
        self.raised += metrics.get("alarms", [])
        if "loss" in metrics:
            self.active = metrics.get("alarms_active", [])
            self.losses.append(metrics["loss"])


def trained(cfg, steps, *, batch=32, at=None, act=None, diverges=False, **train):
    """Alarms and trainer of a run; one whose weights are not finite in the end says so."""
    options = {
        "steps": steps, "seq_len": 16, "global_batch": batch, "warmup_steps": 0,
        "schedule": "constant", "log_every": 1, "balance_speed": 1e-2, "device": "cpu",
    }  # fmt: skip
    run = RunConfig(
        model=cfg, depth=DepthConfig(plan="poisson", mean=MEAN, max_loops=DEEPEST),
        optim=OptimConfig(lr=5e-3, beta2=0.98), train=TrainConfig(**options | train),
    )  # fmt: skip
    alarms, loader = Alarms(), Programs(batch, at, act)
    trainer = loader.trainer = Trainer(build_model(run), loader, run, loggers=[alarms])
    with pytest.raises(DivergedError) if diverges else nullcontext():
        trainer.fit()
    return alarms, trainer


@pytest.mark.parametrize(
    "cfg",
    [pytest.param(CONFIG, id="dense"), pytest.param(EXPERTS, id="experts", marks=pytest.mark.slow)],
)
def test_healthy_training_raises_nothing(cfg):
    """It learns the task and uses its loops; no number leaves its bounds for long."""
    alarms, trainer = trained(cfg, 120, warmup_steps=10)
    assert alarms.raised == []
    assert alarms.losses[-1] < 0.5 < math.log(TASK.entities)
    one, deep = loop_losses(trainer.model, TASK.batch(0, global_batch=64, hops=HOPS), MEAN)
    assert one > 1.1 * deep


@torch.no_grad()
def collapse(trainer):
    """Attention sees all alike, and what it finds drowns what the tokens were."""
    attention = trainer.model.recurrent.blocks[0].attn
    attention.q_proj.weight.zero_()
    attention.out_proj.weight.normal_(std=30.0)


@torch.no_grad()
def explosion(trainer):
    """The adapter of the third loop is large."""
    trainer.model.recurrent.lora.up[2].normal_(std=100.0)


@torch.no_grad()
def nothing_by_looping(trainer):
    """A is 0: every loop begins from B e alone."""
    trainer.model.recurrent.injection.log_A.fill_(30.0)


@torch.no_grad()
def nan_in_the_third_loop(trainer):
    trainer.model.recurrent.lora.up[2] = math.nan


@torch.no_grad()
def all_choose_one(trainer):
    trainer.model.recurrent.blocks[0].ffn.router_bias[2] = 50.0


@torch.no_grad()
def nobody_chooses_one(trainer):
    trainer.model.recurrent.blocks[0].ffn.router_bias[2] = -50.0


ADAPTED = replace(CONFIG, lora_rank=2)
FAULTS = {
    "state_collapse": (CONFIG, collapse, None),
    "state_explosion": (ADAPTED, explosion, 3),
    "recurrence_ignored": (CONFIG, nothing_by_looping, None),
    "not_finite": (ADAPTED, nan_in_the_third_loop, 3),
    "one_expert": (EXPERTS, all_choose_one, None),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_within_ten_logged_steps(name):
    cfg, plant, loop = FAULTS[name]
    alarms, _ = trained(cfg, 15, at=5, act=plant, diverges=name == "not_finite")
    (alarm,) = alarms.raised
    assert alarm["name"] == name
    assert 5 < alarm["step"] <= 15
    assert alarm["fix"] == REMEDIES[name]
    assert loop in (None, alarm["loop"])
    assert [each.partition("/")[0] for each in alarms.active] == [name]


@pytest.mark.slow
def test_uneven_experts_are_named_after_two_hundred_steps():
    alarms, _ = trained(
        EXPERTS, 240, batch=8, at=10, act=nobody_chooses_one, log_every=10, balance_speed=0.0
    )
    (alarm,) = [each for each in alarms.raised if each["name"] == "uneven_experts"]
    assert 210 <= alarm["step"] <= 220
    assert alarm["value"] == 0.0


def test_a_step_that_is_not_logged_and_not_finite_is_looked_at():
    """Its outcome is read one step late."""
    alarms, trainer = trained(
        ADAPTED, 15, at=5, act=nan_in_the_third_loop, log_every=12, diverges=True
    )
    assert [(each["name"], each["step"]) for each in alarms.raised] == [("not_finite", 6)]
    assert trainer.state.skips == 10


@pytest.mark.parametrize(
    ("mean", "most", "value"),
    [(1.05, 8, 1.05), (7.93, 8, 7.92), (1.06, 8, None), (7.9, 8, None), (1.0, 1, None)],
)
def test_bounds_of_a_stuck_gate(mean, most, value):
    alarm = halting_alarm(600, mean, most)
    if value is None:
        assert alarm is None
    else:
        assert (alarm.name, alarm.value) == ("halting_stuck", mean)
        assert alarm.threshold == pytest.approx(value)


def summary(norms=(1.0, 1.2), correlation=(0.1, 0.1), rows=(8, 8), load=None) -> LoopSummary:
    """What a step of two loops measured."""
    means = {"state_norm": list(norms), "delta_norm": list(norms)}
    if correlation is not None:
        means["correlation"] = list(correlation)
    loads = {} if load is None else {1: torch.tensor([load], dtype=torch.float64)}
    return LoopSummary(list(rows), means, loads)


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
    assert [names(dog.observe(step, summary(**good))) for step in range(9)] == [[]] * 9
    # four bad looks, a good one, then five: the good one starts the count again
    looks = [bad] * 4 + [good] + [bad] * 6 + [good] + [bad] * 5
    raised = [names(dog.observe(step, summary(**look))) for step, look in enumerate(looks)]
    assert [step for step, found in enumerate(raised) if found] == [9, 16]
    assert raised[9] == raised[16] == [name]


@pytest.mark.parametrize("gap", [0.0, 0.00099, -0.00099, math.nan])
def test_loops_without_effect(gap):
    dog = LoopWatchdog(CONFIG)
    found = [names(dog.observe(step, summary(), loop_gap=gap)) for step in range(5)]
    assert found == [[]] * 4 + [["recurrence_ignored"]]
    assert dog.observe(5, summary(), loop_gap=None) == []
    assert dog.active == ["recurrence_ignored"]
    for effect in (0.0011, -0.5):
        assert dog.observe(6, summary(), loop_gap=effect) == []
        assert dog.active == []


def test_what_a_beginner_shows_is_judged_late():
    dog, ill = LoopWatchdog(CONFIG, start=100), {"correlation": (0.99, 0.99)}
    early = [dog.observe(step, summary(**ill), loop_gap=0.0) for step in range(90, 100)]
    assert early == [[]] * 10
    late = [names(dog.observe(step, summary(**ill), loop_gap=0.0)) for step in range(100, 105)]
    assert sorted(late[4]) == ["recurrence_ignored", "state_collapse"]
    assert late[:4] == [[]] * 4
    assert first_judged_step(1000, 100) == 200
    assert first_judged_step(1000, 300) == 300
    assert first_judged_step(100_000, 300) == 2000


def test_loops_that_few_sequences_reach_do_not_count_as_collapse():
    dog = LoopWatchdog(CONFIG)
    for step in range(9):
        assert dog.observe(step, summary(correlation=(0.2, 1.0), rows=(8, 3))) == []


def test_a_state_of_zero_has_collapsed():
    dog, empty = LoopWatchdog(CONFIG), summary(norms=(0.0, 0.0), correlation=(0.0, 0.0))
    assert names([a for step in range(5) for a in dog.observe(step, empty)]) == ["state_collapse"]


def test_uneven_experts_after_two_hundred_steps():
    """A starved one and a crowded one; what happens every ten steps needs twenty looks."""
    cfg = replace(EXPERTS, n_experts=8, n_experts_per_tok=1)
    for load in ([0, 14, 14, 14, 14, 14, 15, 15], [510, 70, 70, 70, 70, 70, 70, 70]):
        dog, load = LoopWatchdog(cfg), [100 * x for x in load]
        found = {s: names(dog.observe(s, summary(load=load))) for s in range(10, 311, 10)}
        assert {step: each for step, each in found.items() if each} == {210: ["uneven_experts"]}
    even = [100 * x for x in (2, 14, 14, 14, 14, 14, 14, 14)]
    dog = LoopWatchdog(cfg)
    assert not any(dog.observe(step, summary(load=even)) for step in range(0, 1000, 10))


def test_few_choices_prove_nothing():
    dog = LoopWatchdog(replace(EXPERTS, n_experts=8, n_experts_per_tok=1))
    few = summary(load=[0, 10, 10, 10, 10, 10, 10, 10])
    assert not any(dog.observe(step, few) for step in range(0, 1000, 10))


def test_a_look_at_what_is_broken_clears_nothing():
    dog, long = LoopWatchdog(CONFIG), summary(norms=(2.0, 30.0))
    (alarm,) = [alarm for step in range(5) for alarm in dog.observe(step, long)]
    assert (alarm.name, alarm.value, alarm.loop) == ("state_explosion", 15.0, 2)
    (alarm,) = dog.observe(5, summary(norms=(2.0, math.nan), correlation=(0.1, math.nan)))
    assert (alarm.name, alarm.loop) == ("not_finite", 2)
    assert dog.active == ["not_finite", "state_explosion"]
    assert dog.observe(6, long) == []
    assert dog.active == ["state_explosion"]


def test_all_experts_chosen_is_not_one_expert():
    dog = LoopWatchdog(replace(EXPERTS, n_experts=2, n_experts_per_tok=2))
    assert not any(dog.observe(s, summary(load=[500, 500])) for s in range(0, 1000, 10))


def test_nothing_measured_is_not_judged():
    assert LoopWatchdog(CONFIG).observe(3, LoopSummary([], {}, {})) == []


def test_thresholds_are_the_callers():
    dog = LoopWatchdog(CONFIG, Thresholds(growth=1.1, patience=1))
    (alarm,) = dog.observe(7, summary())
    assert (alarm.name, alarm.step, alarm.loop, alarm.value) == ("state_explosion", 7, 2, 1.2)
    assert "to do" in str(alarm)
    assert json.loads(json.dumps(asdict(alarm))) == asdict(alarm)


@pytest.mark.parametrize("cut", range(0, 12, 2))
def test_resumed_equals_uninterrupted(cut):
    looks = [summary(norms=(1.0, x)) for x in (1, 11, 11, 11, 11, 11, 11, 1, 11, 11, 11, 11, 11)]
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
