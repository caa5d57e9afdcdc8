"""Activation checkpointing changes memory, not numbers."""

import copy

import pytest
import torch

from open_mythos import LoopTrace
from open_mythos.devices import autocast
from open_mythos.errors import ConfigError
from open_mythos.model.depth import Depth
from open_mythos.model.recurrent import RecurrentBlock
from open_mythos.train import build_model, next_token_loss

IDS = torch.arange(28).view(4, 7) % 13
DEPTHS = torch.tensor([1, 4, 2, 3])


def pair(make_run, **model):
    plain = build_model(make_run(model=model))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "injection" not in name:
                parameter += 0.2 * torch.randn_like(parameter)
    wrapped = copy.deepcopy(plain)
    wrapped.recurrent.checkpoint = True
    return plain, wrapped


def gradients(model, dtype=torch.float32, **options):
    trace = LoopTrace(keep_routing=True)
    balance = 0.3 if model.cfg.n_experts else 0.0
    model.train()
    with autocast(torch.device("cpu"), dtype):
        out = next_token_loss(
            model, IDS[:, :-1], IDS[:, 1:], step_tokens=24, step_sequences=4,
            balance_coefficient=balance, trace=trace, sample_seeds=torch.arange(4),
            depth=Depth(**({"n_loops": DEPTHS} | options)),
        )  # fmt: skip
    out.total.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return out.total.detach(), found, trace


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad_loops", [None, 2])
@pytest.mark.parametrize(
    "model",
    [
        {"dropout": 0.2, "initial_state": "normal"},
        {"n_experts": 0, "lora_rank": 0},
        {"moe_backend": "sorted", "loop_embedding": True, "recurrent_layers": 2},
    ],
    ids=["dropout", "dense-ffn", "sorted"],
)
def test_gradients_are_equal(make_run, model, grad_loops, dtype):
    if model.get("loop_embedding"):
        model = model | {"dim": 32}
    plain, wrapped = pair(make_run, **model)
    loss, want, trace = gradients(plain, dtype, grad_loops=grad_loops)
    again, got, trace_again = gradients(wrapped, dtype, grad_loops=grad_loops)
    assert torch.equal(loss, again)
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0, msg=name)
    for name in ("state_norm", "delta_norm", "load"):
        mine, theirs = getattr(trace_again, name), getattr(trace, name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_truncation_reaches_the_weights_in_bfloat16(make_run):
    """Loops with gradient must not use autocast copies made in loops without."""
    plain, _ = pair(make_run)
    _, full, _ = gradients(plain, torch.bfloat16, n_loops=4)
    plain.zero_grad()
    _, cut, _ = gradients(plain, torch.bfloat16, n_loops=4, grad_loops=1)
    assert cut.keys() == full.keys()
    weights = (
        "attn.q_proj.weight",
        "attn.out_proj.weight",
        "ffn.gate_up",
        "ffn.shared.down.weight",
    )
    for name in weights:
        assert cut[f"recurrent.blocks.0.{name}"].abs().sum() > 0, name


def test_loops_are_recomputed_once_and_only_with_gradient(make_run, monkeypatch):
    calls, step = [], RecurrentBlock.step

    def counted(self, h_BTD, drive_BTD, t, ctx, trace=None):
        calls.append(t)
        return step(self, h_BTD, drive_BTD, t, ctx, trace)

    monkeypatch.setattr(RecurrentBlock, "step", counted)
    model = build_model(make_run(model={"lora_rank": 0}))
    model.recurrent.checkpoint = True
    gradients(model, n_loops=3, grad_loops=2)
    assert sorted(calls) == [0, 1, 1, 2, 2]


def test_generation_still_works(make_run):
    plain, wrapped = pair(make_run)
    want = plain.eval().generate(IDS[:, :3], 3, n_loops=2, seed=0)
    assert torch.equal(wrapped.eval().generate(IDS[:, :3], 3, n_loops=2, seed=0), want)


def test_dense_models_reject_checkpointing_of_loops(make_run):
    with pytest.raises(ConfigError):
        make_run(architecture="dense", train={"checkpoint_loops": True}).validate()
