"""PyTorch's transforms, traces and shape-only runs take the model as it is."""

from __future__ import annotations

import pytest
import torch
from helpers import random_ids, small_model
from torch import func
from torch._subclasses.fake_tensor import FakeTensorMode

from open_mythos import ConfigError, KVCache, OpenMythos
from open_mythos.model.exit_rules import exit_rule

pytestmark = [
    pytest.mark.parametrize("attn_type", ["mla", "gqa"]),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]
IDS = random_ids(2, 6)


@pytest.fixture(params=[8, 0], ids=["experts", "dense"])
def model(request, attn_type) -> OpenMythos:
    return small_model(attn_type, n_experts=request.param).eval()


def test_gradients_of_torch_func_are_those_of_backward(model):
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, ids):
        return func.functional_call(model, parameters, (ids,)).square().mean()

    found = func.grad(loss)(parameters, IDS)
    model(IDS).square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
    per_row = func.vmap(func.grad(loss), in_dims=(None, 0))(parameters, IDS.unsqueeze(1))
    mean = {name: each.mean(0) for name, each in per_row.items()}
    torch.testing.assert_close(mean, found, rtol=1e-4, atol=1e-6)


def test_forward_mode_equals_reverse_mode(model):
    e, h, v, w = torch.randn(4, 1, 4, model.cfg.dim).unbind()

    def step(h):
        return model.step(h, e, 0)

    out, tangent = func.jvp(step, (h,), (v,))
    torch.testing.assert_close(out, step(h))
    back = func.vjp(step, h)[1](w)[0]
    torch.testing.assert_close((tangent * w).sum(), (back * v).sum(), rtol=1e-3, atol=1e-4)


def test_vmap_over_states(model):
    h, e = torch.randn(3, 1, 4, model.cfg.dim), torch.randn(1, 4, model.cfg.dim)
    found = func.vmap(lambda h: model.step(h, e, 1))(h)
    torch.testing.assert_close(found, torch.stack([model.step(x, e, 1) for x in h]))


def test_export(model):
    with torch.no_grad():
        program = torch.export.export(model, (IDS,))
        torch.testing.assert_close(program.module()(IDS), model(IDS), rtol=1e-4, atol=1e-4)


def test_a_script_of_one_shape_is_refused(model):
    with pytest.raises(ConfigError, match=r"torch\.export"):
        torch.jit.trace(model, (IDS,))


def test_one_graph(model):
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="eager")(IDS)
        torch.testing.assert_close(found, model(IDS), rtol=1e-4, atol=1e-4)


def test_shapes_alone(model):
    shape = (*IDS.shape, model.cfg.vocab_size)
    with FakeTensorMode():
        assert OpenMythos(model.cfg)(torch.zeros(IDS.shape, dtype=torch.int64)).shape == shape
    meta = OpenMythos(model.cfg).to("meta")
    out = meta(IDS.to("meta"))
    assert out.shape == shape
    out.mean().backward()
    assert meta.embedding.weight.grad.shape == meta.embedding.weight.shape


@pytest.mark.parametrize(
    "changes",
    [{}, {"initial_state": "normal", "relaxation": "mean"}, {"injection": "concat"}],
    ids=str,
)
def test_double_precision_is_double_throughout(attn_type, changes):
    """A derivative by differences agrees to 1e-7; one rounding to float32 would leave 1e-2."""
    model, ids = small_model(attn_type, **changes), random_ids(2, 7)
    single = model(ids).detach()
    model = model.double()
    logits = model(ids)
    assert logits.dtype == torch.float64
    assert (logits - single).abs().max() < 1e-4
    generator = torch.Generator().manual_seed(0)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    ways = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]
    found = torch.autograd.grad(logits.square().sum(), weights, allow_unused=True)
    slope = sum((a * b).sum() for a, b in zip(found, ways, strict=True) if a is not None)
    ends = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for weight, way in zip(weights, ways, strict=True):
                weight += step * way
            ends.append(model(ids).square().sum())
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-6, slope, rtol=1e-6, atol=0)


@torch.no_grad()
def test_double_precision_decodes_and_exits(attn_type):
    model, ids = small_model(attn_type).double(), IDS
    whole = model(ids)
    cache = KVCache()
    parts = [model(ids[:, :4], kv_cache=cache), model(ids[:, 4:], kv_cache=cache, start_pos=4)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)
    never = model(ids, exit_rule=exit_rule("change:1e-300", model))
    torch.testing.assert_close(never, whole, rtol=1e-9, atol=1e-9)
