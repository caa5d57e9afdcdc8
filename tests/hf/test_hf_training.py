"""Trainers: sampled depths, balanced experts, truncated gradients, adapters, packed rows."""

from __future__ import annotations

import pytest
import torch
from helpers import random_ids, small_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainerState, TrainingArguments

from open_mythos import ConfigError, LoopTrace
from open_mythos.hf import OpenMythosForCausalLM, RouterBalance, SampledDepths, from_native
from open_mythos.train.config import DepthConfig
from open_mythos.train.depth import DepthPlan

# of one library about its use by the other
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")

PLAN = DepthConfig(plan="uniform", mean=3, low=1, high=4)
FFN = "core.recurrent.blocks.0.ffn"


class Rows(Dataset):
    """A few token rows to learn by heart."""

    def __init__(self, n=8, length=7):
        self.ids = random_ids(n, length)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def outer(**changes) -> OpenMythosForCausalLM:
    return from_native(small_model(**changes))


def arguments(folder, **settings) -> TrainingArguments:
    return TrainingArguments(
        folder, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=2, seed=0, **settings,
    )  # fmt: skip


def depths_seen(model):
    """Record the depth of every call."""
    seen, run = [], model.model.core.recurrent.register_forward_pre_hook
    run(lambda module, args: seen.append((module.training, args[2].n_loops, args[2].grad_loops)))
    return seen


def test_trainer(tmp_path):
    """Depths of the plan in training, of the configuration in evaluation; the bias moves."""
    model = outer()
    seen, bias = depths_seen(model), model.model.get_submodule(FFN).router_bias.clone()
    settings = arguments(
        tmp_path, max_steps=3, gradient_accumulation_steps=2, gradient_checkpointing=True,
        learning_rate=1e-2, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(
        model, settings, train_dataset=Rows(), eval_dataset=Rows(4),
        callbacks=[SampledDepths(PLAN, grad_loops=2), RouterBalance(speed=0.25)],
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    assert {(training, loops) for training, loops, _ in seen} == {(False, None)}
    seen.clear()
    trainer.train()
    plan = DepthPlan(PLAN, 0)
    want = [tuple(plan.depths(step, range(i, i + 2)).tolist()) for step in range(3) for i in (0, 2)]
    assert seen == [(True, loops, 2) for loops in want]
    moved = (model.model.get_submodule(FFN).router_bias - bias) / 0.25
    assert moved.abs().max() > 0.9
    torch.testing.assert_close(moved, moved.round())
    assert model.model.traces is None
    assert trainer.evaluate()["eval_loss"] < before
    assert not model.model._forward_pre_hooks


def test_load_of_all_loops_and_micro_batches():
    """The bias moves as after one call on all rows, recomputed loops counted once."""
    model, rows, speed = outer().train(), random_ids(4, 7), 0.5
    model._set_gradient_checkpointing(True)
    ffn = model.model.get_submodule(FFN)
    start, callback, trace = ffn.router_bias.clone(), RouterBalance(speed), LoopTrace()
    core = model.model.core
    core.hidden(rows, core.context(rows), trace=trace)
    load = trace.load_by_layer()[ffn.layer]
    callback.on_train_begin(None, None, None, model=model)
    for part in rows.split(2):
        model(part, labels=part).loss.backward()
    model.eval()(rows)
    callback.on_optimizer_step(None, None, None, model=model)
    want = start + speed * torch.sign(load.mean() - load)
    torch.testing.assert_close(ffn.router_bias, want)


def test_a_resumed_run_has_the_same_depths():
    model = outer()
    seen, callback = depths_seen(model.train()), SampledDepths(PLAN)
    callback.on_train_begin(None, None, None, model=model)
    for step in (3, 4, 3):
        callback.on_step_begin(None, TrainerState(global_step=step), None)
        model(random_ids(2, 5))
    assert seen[0] == seen[2]
    model(random_ids(2, 5), n_loops=1)
    assert seen[-1] == (True, 1, None)
    callback.on_train_end(None, None, None)
    model(random_ids(2, 5))
    assert seen[-1] == (True, None, None)


def test_refusals():
    with pytest.raises(ConfigError, match="no experts"):
        RouterBalance().on_train_begin(None, None, None, model=outer(n_experts=0))
    with pytest.raises(ConfigError, match="speed"):
        RouterBalance(0)
    with pytest.raises(ConfigError, match="not a model"):
        SampledDepths(PLAN).on_train_begin(None, None, None, model=torch.nn.Linear(1, 1))


def test_adapters_in_a_trainer(tmp_path):
    """The callbacks find the model inside of PEFT's, and its routing is recorded."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules="all-linear", target_parameters=["ffn.gate_up", "ffn.down"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(outer(), config)
    seen = depths_seen(model.base_model.model)
    bias = next(b for name, b in model.named_buffers() if name.endswith("router_bias"))
    start = bias.clone()
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=3, learning_rate=1e-2), train_dataset=Rows(),
        callbacks=[SampledDepths(PLAN), RouterBalance()],
    )  # fmt: skip
    trainer.train()
    assert len({loops for _, loops, _ in seen}) > 1
    assert not torch.equal(bias, start)
    weights = [w for name, w in model.named_parameters() if "lora_B" in name]
    assert sum(bool(w.any()) for w in weights) == len(weights) - 1  # the gate reads, nothing more


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_sft_of_trl(tmp_path, packing):
    """Fine-tuning with adapters, rows padded or packed, lowers the loss."""
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    datasets = pytest.importorskip("datasets")
    tokenizer = byte_tokenizer()
    model = from_native(small_model(vocab_size=len(tokenizer), max_seq_len=128))
    texts = ["a looped model thinks again", "and once more", "before it speaks"] * 8
    settings = trl.SFTConfig(
        str(tmp_path), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        max_steps=6, learning_rate=3e-2, per_device_train_batch_size=4, max_length=64,
        packing=packing, padding_free=packing, logging_steps=1, bf16=False,
        gradient_checkpointing=True,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model, args=settings, train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tokenizer, callbacks=[SampledDepths(PLAN)],
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    assert losses[-1] < losses[0] - 0.1


def byte_tokenizer():
    """Bytes as tokens, and an end of text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
