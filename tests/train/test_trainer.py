"""The trainer: exact resume, exact accumulation, skipped steps, signals."""

import json
import os
import signal
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_mythos import OpenMythos
from open_mythos.data import Batch, Loader, TokenShards, prepare
from open_mythos.errors import ConfigError, DataError
from open_mythos.seeding import derive_seed
from open_mythos.tokenizer import ByteTokenizer
from open_mythos.train import (
    DivergedError,
    PreemptedError,
    RunConfig,
    TrainConfig,
    Trainer,
    build_model,
    learning_rate,
)
from open_mythos.train.checkpoint.find import read_state
from open_mythos.variants import variant

VOLATILE = {"tokens_per_second", "flops_per_second", "event"}


class Recorder:
    """Keeps what was logged; acts at a step if told to."""

    def __init__(self, at=None, act=None):
        self.lines, self.at, self.act = {}, at, act

    def log(self, step, metrics):
        kept = {name: value for name, value in metrics.items() if name not in VOLATILE}
        if kept:
            self.lines.setdefault(step, {}).update(kept)
        if step == self.at and "loss" in metrics:
            self.act()


def start(run, make_loader, recorder=None, **options):
    loggers = [] if recorder is None else [recorder]
    return Trainer(build_model(run), make_loader(run), run, loggers=loggers, **options)


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


HARD = {
    "model": {"dropout": 0.2, "initial_state": "normal"},
    "depth": {"plan": "poisson", "mean": 2.5, "curriculum_start": 1.0, "curriculum_steps": 4},
    "train": {"micro_batch": 4, "balance_coefficient": 0.01, "schedule": "wsd", "decay_steps": 3,
              "balance_speed": 0.01},
}  # fmt: skip


@pytest.mark.parametrize("architecture", ["looped", "dense"])
def test_learns(make_run, make_loader, architecture):
    recorder = Recorder()
    run = make_run(optim={"lr": 1e-2}, train={"steps": 40}, architecture=architecture)
    start(run, make_loader, recorder).fit()
    losses = [line["loss"] for line in recorder.lines.values()]
    assert losses[0] == pytest.approx(2.56, abs=0.3)  # log 13
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]


@pytest.mark.parametrize(
    "changes",
    [
        HARD,
        HARD | {"train": HARD["train"] | {"grad_loops": 2, "checkpoint_loops": True}},
        HARD | {"train": HARD["train"] | {"dtype": "bfloat16"}},
        {"architecture": "dense", "model": {"dropout": 0.2}, "train": {"micro_batch": 2}},
    ],
    ids=["looped", "truncated", "bfloat16", "dense"],
)
def test_resumed_equals_uninterrupted_bit_for_bit(make_run, make_loader, tmp_path, changes):
    run = make_run(**changes)
    whole = Recorder()
    straight = start(run, make_loader, whole)
    straight.fit()

    pieces = Recorder()
    for steps in (2, 3, 6):
        part = replace(run, train=replace(run.train, out_dir=str(tmp_path), save_every=1))
        trainer = start(part, make_loader, pieces)
        if steps > 2:
            trainer.resume()
        while trainer.state.step < steps:
            # train_step, save: the process "dies" here, long before the schedule's end
            result = trainer.train_step(trainer.state.step)
            trainer._log(result)
            trainer.save()
    assert pieces.lines == whole.lines
    assert len(whole.lines) == 6
    assert_equal(weights(trainer), weights(straight))
    assert trainer.state == straight.state


def test_same_run_twice_is_the_same_and_another_seed_is_not(make_run, make_loader):
    recorders = [Recorder(), Recorder(), Recorder()]
    for seed, recorder in zip((0, 0, 1), recorders, strict=True):
        torch.manual_seed(seed + len(recorder.lines))  # the global generator must not matter
        torch.rand(recorders.index(recorder))
        start(make_run(**HARD | {"train": {"seed": seed}}), make_loader, recorder).fit()
    assert recorders[0].lines == recorders[1].lines
    assert recorders[0].lines != recorders[2].lines


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulation_equals_the_large_batch(make_run, make_loader, micro):
    """Although micro-batches hold unequal numbers of targets and of loops."""

    def first_step(micro_batch):
        changes = HARD | {"train": {"micro_batch": micro_batch, "balance_coefficient": 0.5}}
        trainer = start(make_run(**changes), make_loader)
        gradients = {}
        trainer.optimizer.step = lambda: gradients.update(
            {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        )
        return trainer.train_step(0), gradients, weights(trainer)

    whole, want, bias = first_step(None)
    parts, got, bias_again = first_step(micro)
    assert parts.loss == pytest.approx(whole.loss, abs=1e-6)
    assert parts.balance == pytest.approx(whole.balance, abs=1e-6)
    assert parts.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-6, rtol=1e-4, msg=name)
    assert_equal(
        {n: v for n, v in bias.items() if "router_bias" in n},
        {n: v for n, v in bias_again.items() if "router_bias" in n},
    )
    assert any(value.any() for name, value in bias.items() if "router_bias" in name)


def test_a_step_by_hand(make_run, make_loader):
    """One step equals the same written with plain PyTorch."""
    run = make_run(depth={"plan": "uniform", "high": 4}, train={"balance_speed": 0.5, "clip": 0.1})
    trainer = start(run, make_loader)
    model = build_model(run)
    result = trainer.train_step(0)

    assert all(p.grad is None for p in trainer.model.parameters())  # none is left for the next
    batch, depths = make_loader(run).next_batch(0), trainer.stepper.plan.depths(0, range(8))
    logits = model(batch.input_ids, n_loops=depths)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    loss.backward()
    trained = [p for n, p in model.named_parameters() if "halting" not in n]
    norm = torch.nn.utils.clip_grad_norm_(trained, 0.1)
    assert norm > 0.1
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert result.lr == learning_rate(0, run.train, run.optim) == 0.0005
    assert torch.equal(result.depths, depths)
    matrices = [p for p in trained if p.dim() > 1]
    torch.optim.AdamW(matrices, lr=0.0005, betas=(0.9, 0.95), weight_decay=0.1).step()
    for name, parameter in model.named_parameters():
        if "ffn" in name and parameter.dim() > 1:
            mine = trainer.model.get_parameter(name)
            torch.testing.assert_close(mine, parameter, atol=2e-6, rtol=0, msg=name)


def test_router_bias_follows_the_load_of_all_loops_and_micro_batches(make_run, make_loader):
    run = make_run(train={"balance_speed": 0.25, "micro_batch": 2})
    trainer = start(run, make_loader)
    result = trainer.train_step(0)
    load_E = result.trace.load_by_layer()[1]
    assert load_E.sum() == 2 * 6 * result.depths.sum()  # top-2, T = 6, every loop of every row
    bias_E = trainer.model.recurrent.blocks[0].ffn.router_bias
    assert torch.equal(bias_E, 0.25 * torch.sign(load_E.mean() - load_E))


def test_each_sequence_of_each_step_has_its_own_randomness(make_run, make_loader):
    trainer = start(make_run(train={"seed": 7}), make_loader)
    seeds = [trainer.stepper._sample_seeds(step, torch.arange(8)) for step in range(3)]
    assert len(set(torch.cat(seeds).tolist())) == 24
    assert seeds[1][5] == derive_seed(7, "sample", 1, 5)
    assert torch.equal(trainer.stepper._sample_seeds(1, torch.tensor([5, 2])), seeds[1][[5, 2]])


def test_loops_are_checkpointed_when_asked(make_run, make_loader):
    for asked in (False, True):
        trainer = start(make_run(train={"checkpoint_loops": asked}), make_loader)
        assert trainer.model.recurrent.checkpoint == asked


def test_truncation_changes_the_gradient(make_run, make_loader):
    def norm(**train):
        run = make_run(depth={"plan": "fixed", "mean": 6.0}, optim={"lr": 0.1}, train=train)
        trainer = start(run, make_loader)
        trainer.train_step(0)  # the first weights, whose branches are zero, hide the difference
        return trainer.train_step(1).grad_norm

    full, half, three, all_six = (
        norm(),
        norm(grad_loops="auto"),
        norm(grad_loops=3),
        norm(grad_loops=6),
    )
    assert half == three
    assert half != full
    assert all_six == full


def test_metrics(make_run, make_loader, tmp_path):
    recorder = Recorder()
    run = make_run(train={"out_dir": str(tmp_path), "log_every": 4, "balance_coefficient": 0.1})
    trainer = start(run, make_loader, recorder)
    trainer.fit()
    assert list(recorder.lines) == [4, 6]
    line = recorder.lines[6]
    assert line["tokens"] == 6 * (8 * 6 - 3)
    depths = trainer.stepper.plan.depths(5, range(40, 48))
    assert line["mean_depth"] == depths.double().mean()
    assert len(line["state_norm"]) == len(line["delta_norm"]) == depths.max()
    assert len(line["router_entropy/layer1"]) == depths.max()
    assert 0 < line["rho"] < 1
    assert line["balance_loss"] >= 0.9
    assert line["skipped"] == 0
    written = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name in ("tokens_per_second", "flops_per_second"):
        assert [each.pop(name) > 0 for each in written] == [True, True]
    assert written == [{"step": step} | values for step, values in recorder.lines.items()]


def test_dense_metrics_speak_of_no_loops(make_run, make_loader):
    recorder = Recorder()
    start(make_run(architecture="dense"), make_loader, recorder).fit()
    assert set(recorder.lines[6]) == {"loss", "lr", "grad_norm", "skipped", "tokens"}


def test_evaluation_is_called_and_leaves_no_trace(make_run, make_loader):
    seen = []

    def evaluate(model, depths):
        assert not model.training
        assert not torch.is_grad_enabled()
        seen.append(depths)
        torch.rand(3)
        return {"loss": 1.5}

    run = make_run(**HARD | {"train": {"eval_every": 4, "eval_depths": [1, 8]}})
    watched, alone = Recorder(), Recorder()
    trainer = start(run, make_loader, watched, evaluate=evaluate)
    trainer.fit()
    start(run, make_loader, alone).fit()
    assert seen == [[1, 8], [1, 8]]
    assert trainer.model.training
    assert [step for step, line in watched.lines.items() if line.pop("eval/loss", 0) == 1.5] == [
        4,
        6,
    ]
    assert watched.lines == alone.lines


@pytest.mark.parametrize("where", ["loss", "gradient", "state"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_step_changes_nothing(make_run, make_loader, where, poison):
    run = make_run(**HARD)
    trainer = start(run, make_loader)
    trainer.train_step(0)
    before = weights(trainer)
    moments = {
        i: v.clone() for i, s in enumerate(trainer.optimizer.state.values()) for v in s.values()
    }
    tokens = trainer.state.tokens
    with pytest.MonkeyPatch.context() as patch:
        if where == "loss":
            plain = trainer.stepper._forward_backward
            patch.setattr(
                trainer.stepper,
                "_forward_backward",
                lambda *a: (plain(*a)[0] * poison, *plain(*a)[1:]),
            )
        elif where == "gradient":
            parameter = trainer.model.recurrent.injection.log_A
            hook = parameter.register_hook(
                lambda g: g.clone().index_fill_(0, torch.tensor([3]), poison)
            )
        else:
            plain = OpenMythos.hidden
            patch.setattr(OpenMythos, "hidden", lambda *a, **o: plain(*a, **o) * poison)
        result = trainer.train_step(1)
    if where == "gradient":
        hook.remove()
    assert result.skipped
    assert_equal(weights(trainer), before)
    after = {i: v for i, s in enumerate(trainer.optimizer.state.values()) for v in s.values()}
    assert all(torch.equal(after[i], moments[i]) for i in moments)
    assert all(p.grad is None for p in trainer.stepper.parameters)
    assert (trainer.state.step, trainer.state.skips, trainer.state.tokens) == (2, 1, tokens)
    assert not trainer.train_step(2).skipped
    assert trainer.state.skips == 0


def test_divergence_ends_the_run(make_run, make_loader):
    run = make_run(train={"max_skips": 2})
    trainer = start(run, make_loader)
    with torch.no_grad():
        trainer.model.head.weight.fill_(torch.nan)
    with pytest.raises(DivergedError) as caught:
        trainer.fit()
    # the outcome of the third bad step is read when the fourth is queued
    assert (trainer.state.step, trainer.state.skips) == (4, 4)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_run_is_the_same(make_run, make_loader, tmp_path, number):
    run = make_run(**HARD)
    whole, pieces = Recorder(), Recorder(at=3, act=lambda: os.kill(os.getpid(), number))
    straight = start(run, make_loader, whole)
    straight.fit()
    saved = replace(run, train=replace(run.train, out_dir=str(tmp_path)))
    before = signal.getsignal(number)
    with pytest.raises(PreemptedError) as caught:
        start(saved, make_loader, pieces).fit()
    assert caught.value.exit_code == 75
    assert number.name in str(caught.value)
    assert signal.getsignal(number) is before
    pieces.at = None
    trainer = start(saved, make_loader, pieces)
    assert trainer.resume().step == 3
    trainer.fit()
    assert pieces.lines == whole.lines
    assert_equal(weights(trainer), weights(straight))


def test_the_second_signal_acts_as_usual(make_run, make_loader, tmp_path):
    def interrupt_twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    run = make_run(train={"out_dir": str(tmp_path)})
    loader = make_loader(run)
    plain = loader.next_batch
    loader.next_batch = lambda step: (step == 2 and interrupt_twice(), plain(step))[1]
    with pytest.raises(KeyboardInterrupt):
        Trainer(build_model(run), loader, run).fit()


def test_a_signal_in_the_last_step_is_no_preemption(make_run, make_loader, tmp_path):
    run = make_run(train={"out_dir": str(tmp_path)})
    recorder = Recorder(at=6, act=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert start(run, make_loader, recorder).fit().step == 6


def test_fit_works_outside_the_main_thread(make_run, make_loader, tmp_path):
    run, done = make_run(train={"steps": 1, "out_dir": str(tmp_path)}), []
    trainer = start(run, make_loader)
    thread = threading.Thread(target=lambda: done.append(trainer.fit().step))
    thread.start()
    thread.join()
    assert done == [1]


def test_without_a_folder_nothing_is_written(make_run, make_loader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = start(make_run(), make_loader)
    trainer.fit()
    assert list(tmp_path.iterdir()) == []
    for call in (trainer.save, trainer.resume):
        with pytest.raises(ConfigError, match=r"train\.out_dir"):
            call()


def test_a_finished_run_has_nothing_to_do(make_run, make_loader, tmp_path):
    run = make_run(train={"out_dir": str(tmp_path)})
    start(run, make_loader).fit()
    recorder = Recorder()
    trainer = start(run, make_loader, recorder)
    trainer.resume()
    assert trainer.fit().step == 6
    assert recorder.lines == {}


def test_batches_of_another_shape_are_refused(make_run, make_loader):
    run = make_run()
    for other in ({"global_batch": 4}, {"seq_len": 8}):
        loader = make_loader(make_run(train=other))
        with pytest.raises(ConfigError, match="batches"):
            Trainer(build_model(run), loader, run).train_step(0)


def test_a_model_of_another_configuration_is_refused(make_run, make_loader):
    run, dense = make_run(), make_run(architecture="dense")
    for model in (build_model(make_run(model={"n_experts": 8})), build_model(dense)):
        with pytest.raises(ConfigError, match="not that of the configuration"):
            Trainer(model, make_loader(run), run)
    with pytest.raises(ConfigError, match="not that of the configuration"):
        Trainer(build_model(run), make_loader(run), dense)


def test_the_halting_gate_stays_as_it_is(make_run, make_loader):
    run = make_run()
    trainer = start(run, make_loader)
    before = weights(trainer)
    trainer.fit()
    after = weights(trainer)
    gate = {name for name in before if "halting" in name}
    assert not any(p.requires_grad for p in trainer.model.recurrent.halting.parameters())
    assert gate
    assert all(torch.equal(before[name], after[name]) for name in gate)
    unmoved = {n for n in before if torch.equal(before[n], after[n])} - gate
    assert unmoved == set()


def test_a_change_of_the_callers_config_changes_nothing(make_run, make_loader):
    run = make_run()
    trainer = start(run, make_loader)
    run.train.steps = 1
    assert trainer.fit().step == 6


def test_bfloat16_keeps_float32_weights_and_stays_close(make_run, make_loader):
    lines = []
    for dtype in ("float32", "bfloat16"):
        recorder = Recorder()
        trainer = start(make_run(train={"dtype": dtype}), make_loader, recorder)
        trainer.fit()
        assert all(p.dtype == torch.float32 for p in trainer.stepper.parameters)
        lines.append(recorder.lines[6])
    assert lines[0]["loss"] != lines[1]["loss"]
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=0.05)


def test_document_masks_reach_the_model(make_run, make_loader):
    run = make_run(depth={"plan": "fixed", "mean": 2.0})

    def loss(documents):
        loader = make_loader(run)
        batch = loader.next_batch(0)
        loader.next_batch = lambda step: Batch(
            batch.input_ids, batch.targets, documents, batch.sample_index
        )
        trainer = Trainer(build_model(run), loader, run)
        trainer.train_step(0)
        return trainer.train_step(1).loss

    assert loss(None) != loss(torch.tensor([[0, 0, 0, 1, 1, 1]] * 8))
    assert loss(None) == pytest.approx(loss(torch.zeros(8, 6, dtype=torch.long)), abs=1e-6)


def test_with_the_loader_of_the_library(make_run, tmp_path):
    """Shards, document masks, and a position that other data or seeds cannot take up."""
    prepare(
        [f"text {i}: " + "abc " * i for i in range(30)],
        tmp_path / "data",
        ByteTokenizer(),
        val_fraction=0,
    )
    run = make_run(
        model={"vocab_size": 320},
        train={"out_dir": str(tmp_path / "run"), "steps": 4, "save_every": 2, "micro_batch": 4},
    )

    def begin(recorder, seed=0):
        loader = Loader(
            TokenShards(tmp_path / "data"), seq_len=6, global_batch=8, seed=seed,
            mask_documents=True,
        )  # fmt: skip
        return Trainer(build_model(run), loader, run, loggers=[recorder])

    whole, rest = Recorder(), Recorder()
    begin(whole).fit()
    trainer = begin(rest)
    assert trainer.resume(tmp_path / "run" / "checkpoints" / "step_00000002").step == 2
    assert trainer.loader.state_dict()["step"] == 2
    trainer.fit()
    assert rest.lines == {step: whole.lines[step] for step in (3, 4)}
    with pytest.raises(DataError, match="seed"):
        begin(Recorder(), seed=1).resume()


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**40))
def test_building_a_model_leaves_the_global_generator_alone(seed):
    run = RunConfig(model=variant("nano"), train=TrainConfig(seed=seed))
    state = torch.random.get_rng_state()
    first, second = build_model(run), build_model(run)
    assert torch.equal(state, torch.random.get_rng_state())
    assert_equal(first.state_dict(), second.state_dict())


def test_a_loader_of_another_kind_is_refused(make_run):
    run = make_run()
    batches = torch.utils.data.DataLoader(torch.zeros(8, 4, dtype=torch.int64), 8)
    with pytest.raises(ConfigError, match="next_batch") as found:
        Trainer(build_model(run), batches, run)
    assert found.value.fix


def test_small_gradients_are_not_scaled_up_to_the_clip(make_run, make_loader):
    """AdamW would not notice: the factor itself is looked at."""
    factors = {}
    for clip in (1e-3, 1e9):
        trainer = start(make_run(train={"clip": clip}), make_loader)
        with pytest.MonkeyPatch.context() as patch:
            record = factors.setdefault(clip, [])
            patch.setattr(
                "open_mythos.train.step.scale_gradients", lambda _, f, seen=record: seen.append(f)
            )
            trainer.train_step(0)
    assert factors[1e9] == [1.0]
    assert 0 < factors[1e-3][0] < 1


def test_a_resumed_run_keeps_its_validated_depths(make_run, make_loader, tmp_path):
    run = make_run(train={"out_dir": str(tmp_path)})
    trainer = start(run, make_loader)
    trainer.validated = {"low": 1, "high": 5}
    trainer.save()
    again = start(run, make_loader)
    again.resume()
    assert again.validated == {"low": 1, "high": 5}
    assert read_state(again.save())["validated_depths"] == {"low": 1, "high": 5}
