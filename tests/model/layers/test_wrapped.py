"""Modules around a layer (adapters, quantizers, parametrizations) are called, never read past."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_differs, assert_same, random_ids, small_model
from torch import nn
from torch.nn.utils import parametrize

from open_mythos import ACTHalting, Depth, FixedDepth, KVCache, LoopTrace, RMSNorm
from open_mythos.data.batch import Batch
from open_mythos.evaluation import evaluate_depths, evaluate_exits
from open_mythos.model.layers.moe import MoEFFN
from open_mythos.train.loss import next_token_loss
from open_mythos.train.parallel.compile import compile_block

LOOPS = 3


class Adapter(nn.Module):
    """A low-rank adapter around a linear layer, as PEFT wraps one."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base
        self.a = nn.Parameter(0.3 * torch.randn(rank, base.in_features))
        self.b = nn.Parameter(0.3 * torch.randn(base.out_features, rank))

    def forward(self, x):
        return self.base_layer(x) + x @ self.a.mT @ self.b.mT

    def merged(self) -> nn.Linear:
        merged = copy.deepcopy(self.base_layer)
        merged.weight.data += self.b @ self.a
        return merged


class Wrapper(nn.Module):
    """Hands every call on, and no attribute."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base

    def forward(self, *args, **kwargs):
        return self.base_layer(*args, **kwargs)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def wrapped(name: str):
    """A model without adapters, one with adapters on ``name``, and one with the adapters merged."""
    torch.manual_seed(0)
    plain = small_model()
    with_adapter = copy.deepcopy(plain)
    for module in list(with_adapter.modules()):
        if isinstance(getattr(module, name, None), nn.Linear):
            setattr(module, name, Adapter(getattr(module, name)))
    merged = copy.deepcopy(with_adapter)
    for module in list(merged.modules()):
        if isinstance(getattr(module, name, None), Adapter):
            setattr(module, name, getattr(module, name).merged())
    return plain, with_adapter, merged


def cached(model, ids):
    cache = KVCache()
    parts = [model(ids[:, :6], LOOPS, cache)]
    for i in range(6, ids.shape[1]):
        parts.append(model(ids[:, i : i + 1], LOOPS, cache, i))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", ["kv_up", "router"])
def test_an_adapter_acts_in_every_way_to_compute(name):
    plain, adapted, merged = wrapped(name)
    ids = random_ids(2, 10)
    with torch.no_grad():
        want = merged(ids, LOOPS)
        assert_differs(plain(ids, LOOPS), want)
        assert_same(adapted(ids, LOOPS), want)
    assert_same(cached(adapted, ids), want)


@pytest.mark.parametrize("name", ["kv_up", "router"])
def test_an_adapter_has_gradients(name):
    _, adapted, _ = wrapped(name)
    adapted.train()(random_ids(2, 10), LOOPS).square().mean().backward()
    adapters = [module for module in adapted.modules() if isinstance(module, Adapter)]
    assert adapters
    assert all(each.a.grad.any() and each.b.grad.any() for each in adapters)


@pytest.mark.parametrize("block_norms", ["in", "in+out", "out", "in+sum"])
def test_wrapped_norms_act(block_norms):
    """Where a norm stands follows from the configuration, not from the type of the module."""
    plain = small_model(block_norms=block_norms)
    model = copy.deepcopy(plain)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, RMSNorm) and name.startswith(("attn_", "ffn_")):
                setattr(module, name, Wrapper(child))
    ids = random_ids(2, 7)
    with torch.no_grad():
        assert torch.equal(model(ids, LOOPS), plain(ids, LOOPS))


def test_a_wrapped_injection_is_called():
    """An adapter may change its weights during the call alone."""
    plain = small_model()
    model = copy.deepcopy(plain)
    model.recurrent.injection = Wrapper(model.recurrent.injection)
    ids = random_ids(2, 7)
    with torch.no_grad():
        assert torch.equal(model(ids, LOOPS), plain(ids, LOOPS))
        assert torch.equal(list(model.unroll(ids, 2))[-1][1], list(plain.unroll(ids, 2))[-1][1])
        assert_same(cached(model, ids), plain(ids, LOOPS))


def test_hooks_fire_in_every_loop():
    model, seen = small_model(), []
    for part in (model.recurrent.injection, model.recurrent.blocks[0]):
        part.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    with torch.no_grad():
        model(random_ids(2, 7), LOOPS)
    assert seen.count("TransformerBlock") == LOOPS
    assert seen.count("LTIInjection") >= LOOPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_halting_gate_is_called(dtype):
    halting = ACTHalting(32)
    adapter = halting.gate = Adapter(halting.gate)
    states = torch.randn(2, 3, 32)
    merged = halting.to(dtype).gate.base_layer.weight.float() + (
        adapter.b.float() @ adapter.a.float()
    )
    want = (states @ merged.mT + adapter.base_layer.bias.float()).squeeze(-1).sigmoid()
    assert_same(halting(states).detach(), want.detach())


def batch_of(ids):
    return Batch.from_windows(ids, torch.arange(len(ids)), eos_id=None)


def test_an_adapter_on_the_head_counts_in_every_loss():
    """And so do the scale and the cap of the logits."""
    scaled = small_model(logit_scale=0.7, logit_softcap=2.0)
    plain = small_model()
    ids = random_ids(2, 9)
    batch = batch_of(ids)
    for model, head in ((scaled, scaled.head), (plain, Adapter(plain.head))):
        model.head = head
        logits = model(batch.input_ids, LOOPS).float().detach()
        want = nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).item()
        n = batch.targets.numel()
        out = next_token_loss(
            model, batch.input_ids, batch.targets, step_tokens=n, step_sequences=2,
            depth=Depth(LOOPS),
        )  # fmt: skip
        assert out.nll.item() == pytest.approx(want, rel=1e-5)
        (row,) = evaluate_depths(model, [batch], [LOOPS])
        assert row.loss == pytest.approx(want, rel=1e-5)
        report = evaluate_exits(model, [batch], FixedDepth(LOOPS), LOOPS)
        assert report.adaptive.loss == pytest.approx(want, rel=1e-5)
        out.total.backward()
        assert all(p.grad.any() for p in head.parameters() if p.requires_grad)


def test_an_adapter_on_a_compiled_mixture_acts():
    """Its weights exist during the call alone: they cannot be prepared before."""
    plain = small_model()
    model = copy.deepcopy(plain)
    for block in model.recurrent.blocks:
        block.ffn = Wrapper(block.ffn)
        compile_block(block, rows_leave=True, backend="eager")
    ids = random_ids(2, 7)
    with torch.no_grad():
        assert_same(model(ids, LOOPS), plain(ids, LOOPS))


def test_a_wrapped_mixture_routes_and_is_recorded():
    plain = small_model()
    model = copy.deepcopy(plain)
    block = model.recurrent.blocks[0]
    block.ffn = Wrapper(block.ffn)
    ids, traces = random_ids(2, 7), (LoopTrace(), LoopTrace())
    with torch.no_grad():
        results = [
            each(ids, LOOPS, trace=t) for each, t in zip((plain, model), traces, strict=True)
        ]
    assert torch.equal(*results)
    assert traces[0].load.keys() == traces[1].load.keys() != set()
    assert all(torch.equal(traces[0].load[key], traces[1].load[key]) for key in traces[0].load)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_computed_on_access(dtype):
    """A parametrization returns a new tensor at every access; its memory may be used again."""
    model = small_model(recurrent_layers=2).train()
    doubled = copy.deepcopy(model)
    for module in doubled.modules():
        if isinstance(module, MoEFFN):
            for name in ("gate_up", "down"):
                getattr(module, name).data /= 2
                parametrize.register_parametrization(module, name, Doubled())
    ids, grads = random_ids(2, 7), []
    for each in (model, doubled):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            each(ids, LOOPS).float().square().mean().backward()
        grads.append([p.grad for name, p in each.named_parameters() if "attn" in name])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


def test_injections_take_an_input_of_another_dtype():
    injection = small_model().recurrent.injection
    e = torch.randn(2, 3, 32)
    with torch.no_grad():
        assert_same(injection.drive(e.bfloat16()), injection.drive(e.bfloat16().float()))
