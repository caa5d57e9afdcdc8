"""Adapters of PEFT on every part: exact at the start, trained, cached, saved, merged."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_differs, assert_same, random_ids, small_model
from transformers import DynamicCache

from open_mythos.hf import OpenMythosForCausalLM, from_native

peft = pytest.importorskip("peft")

# of one library about its use by the other
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")

B, T, LOOPS = 2, 9, 3
EXPERTS = ["ffn.gate_up", "ffn.down"]


def target(*modules, **more):
    return {"target_modules": list(modules), **more}


ROWS = {
    "gqa attention": ("gqa", target("q_proj", "kv_proj", "out_proj")),
    "mla attention": ("mla", target("q_down", "q_up", "kv_down", "out_proj")),
    "kv_up": ("mla", target("kv_up")),
    "shared experts": ("mla", target("shared.gate_up", "shared.down")),
    "feed-forward": ("mla", target("prelude.0.ffn.gate_up", "coda.0.ffn.down")),
    "router": ("gqa", target("router")),
    "experts": ("mla", target(target_parameters=EXPERTS)),
    "experts too": ("gqa", target("q_proj", target_parameters=EXPERTS)),
    "readout": ("mla", target("readout")),
    "injection": ("mla", target(target_parameters=["injection.B"])),
    "loop adapters": ("mla", target(target_parameters=["lora.down", "lora.up"])),
    "saved whole": ("mla", target("q_up", modules_to_save=["injection", "attn_norm"])),
    "all of gqa": ("gqa", {"target_modules": "all-linear"}),
    "all of mla": ("mla", {"target_modules": "all-linear"}),
}


def base(attn_type) -> OpenMythosForCausalLM:
    return from_native(small_model(attn_type))


def adapted(attn_type, settings):
    config = peft.LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **settings)
    return peft.get_peft_model(base(attn_type), config)


@torch.no_grad()
def shake(model, seed=0):
    """Give every trainable weight a value that matters."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight += 0.3 * torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5
    return model.eval()


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, n_loops=LOOPS).logits


@torch.no_grad()
def by_token(model, ids):
    cache, parts, start = DynamicCache(), [], 0
    for end in range(4, T + 1):
        out = model(input_ids=ids[:, start:end], n_loops=LOOPS, past_key_values=cache)
        parts, start = [*parts, out.logits], end
    return torch.cat(parts, 1)


@pytest.mark.parametrize("row", ROWS)
def test_every_row(row, tmp_path):
    attn_type, settings = ROWS[row]
    ids = random_ids(B, T)
    before = logits(base(attn_type).eval(), ids)
    model = adapted(attn_type, settings)
    assert torch.equal(logits(model.eval(), ids), before)

    model.train()(input_ids=ids, labels=ids, n_loops=LOOPS).loss.backward()
    for name, weight in model.named_parameters():  # A has none while B is zero
        if "lora_B" in name and ".halting." not in name:
            assert weight.grad is not None, name
            assert weight.grad.any(), name

    after = logits(shake(model), ids)
    assert_differs(after, before)
    assert_same(by_token(model, ids), after, 1e-5)

    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(attn_type), tmp_path).eval()
    assert torch.equal(logits(loaded, ids), after)

    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged) is OpenMythosForCausalLM
    assert_same(logits(merged, ids), after, 1e-5)


def test_all_linear_leaves_the_head_out():
    """And reaches every linear layer of the blocks, the router too."""
    model = adapted("mla", {"target_modules": "all-linear"})
    names = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert not any("lm_head" in name for name in names)
    for part in ("kv_up", "router", "shared.gate_up", "readout"):
        assert any(name.endswith(part) for name in names), part


def test_adapters_of_experts_read_their_input():
    """A is (rank of all experts, inputs): the layout of the weights is known to PEFT."""
    model = adapted("mla", target(target_parameters=["ffn.down"]))
    (shape,) = [p.shape for name, p in model.named_parameters() if "lora_A" in name]
    assert tuple(shape) == (2 * 8, 16)


def test_generate():
    """With a cache as without, and at the depth that is asked for."""
    model = shake(adapted("mla", {"target_modules": "all-linear", "target_parameters": EXPERTS}))
    ids = random_ids(B, T)
    arguments = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 5,
        "do_sample": False, "pad_token_id": 0, "n_loops": LOOPS,
    }  # fmt: skip
    want = model.generate(**arguments, use_cache=False)
    assert torch.equal(model.generate(**arguments), want)


def test_checkpointed_gradients():
    """The same as without checkpointing, to the bit."""
    model, ids, grads = adapted("mla", ROWS["all of mla"][1]), random_ids(B, T), []
    shake(model).train()
    for enable in (False, True):
        model.base_model.model._set_gradient_checkpointing(enable)
        model.zero_grad()
        model(input_ids=ids, labels=ids, n_loops=LOOPS).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() != set()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
