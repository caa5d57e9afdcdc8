"""The list of parameters against built models, and the parts that sharding makes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from open_mythos.accounting import account
from open_mythos.model.dense import DenseTransformer
from open_mythos.model.mythos import OpenMythos
from open_mythos.plan.memory import is_muon
from open_mythos.plan.parameters import Parameter, parameters
from open_mythos.train.optimizers.optim import NOT_TRAINED, rule_of
from open_mythos.variants import VARIANTS, variant

from .small import SMALL

CHANGES = {
    "mla": {},
    "gqa": {"attn_type": "gqa"},
    "direct query": {"q_lora_rank": 0},
    "no experts": {"n_experts": 0, "ffn_dim": 48},
    "no shared experts": {"n_shared_experts": 0},
    "bare": {
        "lora_rank": 0, "readout": False, "prelude_norm": False, "injection_matrix": "diagonal",
        "prelude_layers": 0, "coda_layers": 0,
    },
    "two blocks": {"recurrent_layers": 2},
    "tied": {"tie_embeddings": True},
}  # fmt: skip
CONFIGS = {name: replace(SMALL, **changes) for name, changes in CHANGES.items()}


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def listed(*arguments: object) -> dict[str, tuple[int, ...]]:
    return {each.name: each.shape for each in parameters(*arguments)}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant(name: str) -> None:
    with torch.device("meta"):
        model = OpenMythos(variant(name))
    assert listed(variant(name)) == shapes(model)
    assert sum(each.n for each in parameters(variant(name))) == account(variant(name)).parameters


@pytest.mark.parametrize("name", CONFIGS)
def test_every_kind_of_model(name: str) -> None:
    assert listed(CONFIGS[name]) == shapes(OpenMythos(CONFIGS[name]))


@pytest.mark.parametrize("name", ["mla", "gqa", "tied"])
def test_dense_models(name: str) -> None:
    model = DenseTransformer(CONFIGS[name], 3, ffn_dim=20)
    assert listed(model.cfg, 3) == shapes(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_units_are_modules_of_the_model(name: str) -> None:
    modules = dict(OpenMythos(CONFIGS[name]).named_modules())
    for each in parameters(CONFIGS[name]):
        if each.unit != "model":
            assert each.unit in modules
            assert each.name.startswith(each.unit + ".")
        else:
            assert not each.name.startswith(("prelude.", "recurrent.", "coda."))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_trained_and_by_which_optimizer(name: str) -> None:
    """The plan loads no torch, so it repeats a table of the optimizer; here they are compared."""
    for each in parameters(CONFIGS[name]):
        assert each.trained == (not NOT_TRAINED.search(each.name))
        by_muon = each.trained and len(each.shape) > 1 and rule_of(each.name).maps > 0
        assert is_muon(each) == by_muon, each.name


@pytest.mark.parametrize(("rows", "processes"), [(8, 2), (9, 4), (10, 4), (3, 8), (64, 64)])
def test_parts_are_those_of_torch_chunk(rows: int, processes: int) -> None:
    each = Parameter("weight", (rows, 5), "model")
    chunks = [part.numel() for part in torch.empty(rows, 5).chunk(processes)]
    chunks += [0] * (processes - len(chunks))
    assert [each.held(processes, rank) for rank in range(processes)] == chunks
    assert each.chunk(processes) == chunks[0]
