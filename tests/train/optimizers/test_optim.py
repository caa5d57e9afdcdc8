"""Which parameters get which optimizer, which are decayed, which are trained at all."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from open_mythos.errors import ConfigError
from open_mythos.train import (
    OptimConfig,
    Trainer,
    build_model,
    build_optimizer,
    parameter_groups,
)
from open_mythos.train.config import OPTIMIZER_NAMES
from open_mythos.train.optimizers.muon import MuonAdamW
from open_mythos.train.optimizers.optim import NOT_TRAINED, OPTIMIZERS, RULES, rule_of

PAGE = Path(__file__).parents[3] / "docs" / "optimizers.md"
MLA = {"attn_type": "mla", "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
       "qk_nope_head_dim": 8, "v_head_dim": 8}  # fmt: skip

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


MODELS = pytest.mark.parametrize(
    "model", [{}, MLA, {"injection_matrix": "diagonal", "n_experts": 0, "lora_rank": 0}]
)


@MODELS
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


def muon_groups(model):
    groups = parameter_groups(model, 0.1, "muon")
    return {group["name"]: {name for name, _ in group["params"]} for group in groups}


@MODELS
def test_muon_takes_from_the_decayed_matrices_alone(make_run, model):
    model = build_model(make_run(model=model))
    decay, no_decay = names(model)
    groups = muon_groups(model)
    assert groups["no_decay"] == set(no_decay)
    assert groups["muon"] | groups["muon_pairs"] | groups["decay"] == set(decay)
    assert sum(map(len, groups.values())) == len(decay) + len(no_decay)
    settings = [group["weight_decay"] for group in parameter_groups(model, 0.1, "muon")]
    assert settings == [0.1, 0.1, 0.1, 0.0]


def test_every_matrix_of_the_loop(make_run):
    groups = muon_groups(build_model(make_run()))
    block = "recurrent.blocks.0."
    pairs = {"attn.kv_proj.weight", "ffn.gate_up", "ffn.shared.gate_up.weight"}
    single = {"attn.q_proj.weight", "attn.out_proj.weight", "ffn.down", "ffn.shared.down.weight"}
    assert {name for name in groups["muon_pairs"] if "recurrent" in name} == {
        block + n for n in pairs
    }
    assert {name for name in groups["muon"] if "recurrent" in name} == {block + n for n in single}
    assert groups["decay"] == {
        "head.weight", block + "ffn.router.weight", "recurrent.lora.down", "recurrent.lora.up"
    }  # fmt: skip


def test_latent_attention(make_run):
    groups = muon_groups(build_model(make_run(model=MLA)))
    kinds = {"q_down", "q_up", "kv_down", "kv_up", "out_proj"}
    assert {name for name in groups["muon"] if "prelude.0.attn" in name} == {
        f"prelude.0.attn.{kind}.weight" for kind in kinds
    }


@pytest.mark.parametrize(
    "changes", [{"architecture": "dense"}, {"model": {"tie_embeddings": True}}]
)
def test_other_models_with_muon(make_run, changes):
    model = build_model(make_run(**changes))
    groups = muon_groups(model)
    assert "embedding.weight" in groups["no_decay"]
    assert all(name.count(".") > 1 for name in groups["muon"] | groups["muon_pairs"])
    optimizer = build_optimizer(model, OptimConfig(name="muon"))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (".halting." in name), name


def test_maps_side_by_side_are_those_of_the_layers(make_run):
    """What the optimizer takes for two maps is what the layers cut in two."""
    model = build_model(make_run())
    pairs = {name for name in muon_groups(model)["muon_pairs"] if "recurrent" in name}
    ffn, attn = model.recurrent.blocks[0].ffn, model.recurrent.blocks[0].attn
    with torch.no_grad():
        ffn.gate_up[..., ffn.gate_up.shape[-1] // 2 :] = 0  # up
        ffn.shared.gate_up.weight[len(ffn.shared.gate_up.weight) // 2 :] = 0
        nn.init.ones_(ffn.down)
        nn.init.ones_(ffn.shared.down.weight)
        attn.kv_proj.weight[len(attn.kv_proj.weight) // 2 :] = 0  # values
        nn.init.ones_(attn.out_proj.weight)
        x = torch.randn(1, 4, 16)
        assert not ffn(x).any()
        assert not attn(x).any()
    assert len(pairs) == 3


def test_one_optimizer_to_its_caller(make_run):
    config = OptimConfig(name="muon", lr=0.1, momentum=0.9, nesterov=False, ns_steps=3)
    model = build_model(make_run())
    optimizer = build_optimizer(model, config)
    assert isinstance(optimizer, MuonAdamW)
    assert [group["name"] for group in optimizer.param_groups] == [
        "muon", "muon_pairs", "decay", "no_decay"
    ]  # fmt: skip
    for group in optimizer.param_groups[:2]:
        assert (group["lr"], group["momentum"], group["nesterov"]) == (0.1, 0.9, False)
        assert group["ns_steps"] == 3
    for group in optimizer.param_groups[2:]:
        assert (group["lr"], group["betas"], group["fused"]) == (0.1, (0.9, 0.95), True)
    assert type(build_optimizer(model, OptimConfig())) is torch.optim.AdamW


def test_resumed_with_muon_equals_uninterrupted_bit_for_bit(make_run, make_loader, tmp_path):
    run = make_run(optim={"name": "muon", "lr": 0.01}, train={"schedule": "constant"})
    run = replace(run, train=replace(run.train, out_dir=str(tmp_path)))
    straight = Trainer(build_model(run), make_loader(run), run)
    for step in range(4):
        straight.train_step(step)
        if step == 1:
            straight.save()
    again = Trainer(build_model(run), make_loader(run), run)
    again.resume()
    for step in range(2, 4):
        again.train_step(step)
    want, got = straight.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_unknown_optimizers_are_refused(make_run):
    with pytest.raises(ConfigError, match="adamw, muon"):
        parameter_groups(build_model(make_run()), 0.1, "sgd")


def test_muon_without_matrices_it_knows_is_refused():
    with pytest.raises(ConfigError, match="no matrices that Muon knows"):
        build_optimizer(nn.Linear(3, 4), OptimConfig(name="muon"))


def test_names_match_the_table():
    assert tuple(OPTIMIZERS) == OPTIMIZER_NAMES


def table():
    """The table of the page, from the rules."""
    yield "| parameters | `adamw` | `muon` | weight decay | why |"
    yield "|---|---|---|---|---|"
    yield "| halting gate | none | none | - | it is trained later, on the frozen model |"
    for rule in RULES:
        muon = {0: "AdamW", 1: "Muon", 2: "Muon, each of two maps"}[rule.maps]
        yield f"| {rule.what} | AdamW | {muon} | {'yes' if rule.decayed else 'no'} | {rule.why} |"


def test_the_page_says_what_the_code_does():
    assert "\n".join(table()) in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_every_rule_is_needed(make_run, attn_type):
    """Each but the last decides for some parameter, and nothing falls through to the last."""
    model = build_model(make_run(model=MLA if attn_type == "mla" else {}))
    hit = {
        rule_of(name).what for name, _ in model.named_parameters() if not NOT_TRAINED.search(name)
    }
    missing = {rule.what for rule in RULES} - hit
    assert RULES[-1].what in missing
    assert len(missing) == (2 if attn_type == "mla" else 1)  # latent attention has no kv_proj


def test_adamw_can_have_a_rate_of_its_own(make_run):
    """The rate of every group follows the schedule; a rate of 0 means that of Muon."""
    for rate, expected in ((0.0, 1.0), (5e-5, 0.05)):
        run = make_run()
        run.optim = OptimConfig(name="muon", lr=1e-3, adamw_lr=rate)
        optimizer = build_optimizer(build_model(run), run.optim)
        factors = {group["name"]: group["lr_factor"] for group in optimizer.param_groups}
        assert factors == {
            "muon": 1.0, "muon_pairs": 1.0, "decay": expected, "no_decay": expected,
        }  # fmt: skip


def test_a_step_uses_both_rates(make_run, make_loader):
    run = make_run(
        optim={"name": "muon", "lr": 1e-2, "adamw_lr": 1e-4},
        train={"schedule": "constant", "warmup_steps": 2},
    )
    trainer = Trainer(build_model(run), make_loader(run), run)
    before = {name: each.clone() for name, each in trainer.model.named_parameters()}
    trainer.train_step(0)
    rates = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == pytest.approx(
        {"muon": 5e-3, "muon_pairs": 5e-3, "decay": 5e-5, "no_decay": 5e-5}
    )
    moved = {name: (each - before[name]).abs().max() for name, each in
             trainer.model.named_parameters()}  # fmt: skip
    assert moved["head.weight"] <= 1.1 * 5e-5
    assert moved["recurrent.blocks.0.attn.q_proj.weight"] > 1e-4


def test_the_rate_of_adamw_needs_muon():
    with pytest.raises(ConfigError, match="adamw_lr"):
        OptimConfig(adamw_lr=1e-4).validate()
