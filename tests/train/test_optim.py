"""Which parameters are decayed, which are trained at all."""

import pytest
import torch

from open_mythos.train import OptimConfig, build_model, build_optimizer, parameter_groups

DECAYED = {
    "attn.q_proj.weight", "attn.kv_proj.weight", "attn.out_proj.weight", "ffn.router.weight",
    "ffn.gate_up", "ffn.down", "ffn.shared.gate_up.weight", "ffn.shared.down.weight",
    "lora.down", "lora.up", "head.weight",
}  # fmt: skip


def names(model):
    decay, no_decay = parameter_groups(model, 0.1)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)
    return [[name for name, _ in group["params"]] for group in (decay, no_decay)]


def test_every_name_of_the_loop(make_run):
    decay, no_decay = names(build_model(make_run()))
    block = {name for name in decay if name.startswith("recurrent.")}
    assert {name.removeprefix("recurrent.").removeprefix("blocks.0.") for name in block} == (
        DECAYED - {"head.weight"}
    )
    assert "head.weight" in decay
    assert {name for name in no_decay if "blocks" not in name and "prelude." not in name} >= {
        "embedding.weight", "readout.weight", "prelude_norm.weight", "final_norm.weight",
        "recurrent.injection.log_A", "recurrent.injection.dt_bias", "recurrent.injection.B",
        "recurrent.lora_norm.weight",
    }  # fmt: skip
    assert not any(word in name for name in decay for word in ("norm", "injection", "readout"))


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"attn_type": "mla", "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
         "qk_nope_head_dim": 8, "v_head_dim": 8},
        {"injection_matrix": "diagonal", "n_experts": 0, "lora_rank": 0},
    ],
)  # fmt: skip
def test_groups_are_a_partition_without_the_halting_gate(make_run, model):
    model = build_model(make_run(model=model))
    decay, no_decay = names(model)
    trained = {name for name, _ in model.named_parameters() if ".halting." not in name}
    assert len(decay) + len(no_decay) == len(trained)
    assert {*decay, *no_decay} == trained
    shapes = dict(model.named_parameters())
    assert all(shapes[name].dim() >= 2 for name in decay)


def test_a_tied_head_is_one_undecayed_parameter(make_run):
    decay, no_decay = names(build_model(make_run(model={"tie_embeddings": True})))
    assert "embedding.weight" in no_decay
    assert "head.weight" not in [*decay, *no_decay]


def test_dense_model(make_run):
    decay, no_decay = names(build_model(make_run(architecture="dense")))
    assert "head.weight" in decay
    assert "embedding.weight" in no_decay


def test_decay_acts_on_one_group_only(make_run):
    model = build_model(make_run())
    optimizer = build_optimizer(model, OptimConfig(lr=0.5, weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = dict(model.named_parameters())
    decay, no_decay = names(model)
    for name in decay:
        torch.testing.assert_close(after[name], 0.75 * before[name])
    for name in [*no_decay, "recurrent.halting.gate.weight"]:
        assert torch.equal(after[name], before[name])


def test_hyperparameters_arrive(make_run):
    config = OptimConfig(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-5)
    for group in build_optimizer(build_model(make_run()), config).param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.1, (0.8, 0.9), 1e-5)
        assert group["fused"]
