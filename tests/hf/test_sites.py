"""Attention by another engine: what it keeps per site is all that a model needs to go on."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from helpers import small_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from open_mythos import save_pretrained
from open_mythos.errors import ConfigError
from open_mythos.hf import register
from open_mythos.hf.sites import Sites, hidden_at_sites
from open_mythos.model.depth import Depth
from open_mythos.model.mythos import OpenMythos

N_LOOPS = 5
ROOT = Path(__file__).parents[2]
SHAPES = [
    {"prelude_layers": 1, "recurrent_layers": 2, "coda_layers": 1, "n_experts": 0},
    {"prelude_layers": 0, "coda_layers": 0, "n_experts": 0, "injection": "none"},
    {"initial_state": "prelude", "qk_norm": "head", "attn_scale": 0.3},
]


class StandIn:
    """An engine that keeps keys and values by layer index and request."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.requests = torch.zeros(0)

    def attention(self, module, query, key, value, mask, *, scaling, attention_instances):
        """Attend for every request alone; shapes (1, heads, N, K)."""
        assert mask is None
        assert attention_instances is self
        assert next(module.parameters(), None) is None
        groups, outputs = module.num_key_value_groups, torch.empty_like(query)
        for request in self.requests.unique().tolist():
            mine = self.requests == request
            site = module.layer_idx, request
            new = key[0, :, mine], value[0, :, mine]
            if site in self.kept:
                new = tuple(torch.cat(x, dim=1) for x in zip(self.kept[site], new, strict=True))
            self.kept[site] = k_GSK, v_GSK = new
            scores = query[0, :, mine] @ k_GSK.repeat_interleave(groups, 0).mT * scaling
            n_new, n_all = scores.shape[-2:]
            hidden = torch.ones(n_new, n_all, dtype=torch.bool).triu(n_all - n_new + 1)
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            outputs[0, :, mine] = weights @ v_GSK.repeat_interleave(groups, 0)
        return outputs.transpose(1, 2).flatten(2), None


@pytest.fixture
def engine() -> Iterator[StandIn]:
    """A stand-in, registered as engines register theirs."""
    engine = StandIn()
    ALL_ATTENTION_FUNCTIONS.register("stand_in", engine.attention)
    yield engine
    del ALL_ATTENTION_FUNCTIONS._global_mapping["stand_in"]


def served(engine: StandIn, model: OpenMythos, prompts: list[Tensor]) -> list[Tensor]:
    """Final hidden states of prompts computed together: a chunk, the rest, then token by token."""
    sites = Sites(model.cfg, "stand_in", {"attention_instances": engine})
    found: list[list[Tensor]] = [[] for _ in prompts]
    at = [0] * len(prompts)
    for size in (3, 2, *[1] * 8):
        new = [(i, p) for i, ids in enumerate(prompts) for p in range(at[i], at[i] + size)
               if p < len(ids)]  # fmt: skip
        if not new:
            break
        engine.requests = torch.tensor([i for i, _ in new])
        ids = torch.stack([prompts[i][p] for i, p in new])[None]
        positions = torch.tensor([[p for _, p in new]])
        hidden = hidden_at_sites(model, ids, positions, Depth(N_LOOPS), sites)
        for (i, _), row in zip(new, hidden[0], strict=True):
            found[i].append(row)
        at = [start + size for start in at]
    return [torch.stack(rows) for rows in found]


@pytest.mark.parametrize("shape", SHAPES, ids=["outer layers", "loop alone", "norms, experts"])
@torch.no_grad()
def test_a_model_in_another_engine(engine, shape):
    model = small_model("gqa", **shape).eval()
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(model.cfg.vocab_size, (n,), generator=draw) for n in (7, 4, 11)]
    for ids, found in zip(prompts, served(engine, model, prompts), strict=True):
        whole = model.hidden(ids[None], model.context(ids[None]), Depth(N_LOOPS))[0]
        assert (found - whole).abs().max() < 1e-5 * whole.abs().max().clamp(min=1)
    used = {index for index, _ in engine.kept}
    assert used == set(range(model.cfg.cache_slots(N_LOOPS))), "a site per layer and loop"


@torch.no_grad()
def test_sites_of_loops_that_share_an_index_are_wrong(engine, monkeypatch):
    """Were there a site per layer only, loops would see each other's keys."""
    monkeypatch.setattr("open_mythos.hf.sites.slot_index", lambda cfg, layer, loop: layer)
    model = small_model("gqa", n_experts=0).eval()
    ids = torch.arange(7)
    (found,) = served(engine, model, [ids])
    whole = model.hidden(ids[None], model.context(ids[None]), Depth(N_LOOPS))[0]
    assert (found - whole).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("where", "fields"),
    [
        ("attn_type", {"attn_type": "mla"}),
        ("kv_share", {"kv_share": "last"}),
        ("initial_state", {"initial_state": "normal"}),
        ("window", {"layer_overrides": {"0": {"window": 4}}}),
    ],
)
def test_what_another_engine_cannot_run(engine, where, fields):
    model = small_model(**{"attn_type": "gqa", **fields}).eval()
    sites = Sites(model.cfg, "stand_in", {"attention_instances": engine})
    with pytest.raises(ConfigError, match="cannot run in another engine") as caught:
        hidden_at_sites(model, torch.zeros(1, 2).long(), torch.arange(2)[None], Depth(2), sites)
    assert caught.value.where == where


@torch.no_grad()
def test_as_engines_call_it(engine, tmp_path):
    """Built from the configuration alone, weights loaded by name, a call on flat tokens."""
    model = small_model("gqa", n_experts=0).eval()
    save_pretrained(model, tmp_path, format="hf")
    register()
    config = AutoConfig.from_pretrained(tmp_path, n_loops=N_LOOPS)
    assert config.num_hidden_layers == model.cfg.cache_slots(N_LOOPS)
    assert getattr(config, "kv_lora_rank", None) is None, "taken for latent attention"
    config._attn_implementation = "stand_in"
    with torch.device("meta"):
        headless = AutoModel.from_config(config)
    assert headless.is_backend_compatible()
    weights = load_file(tmp_path / "model.safetensors")
    names = {f"model.{name}" for name, _ in headless.named_parameters()}
    assert names == set(weights) - {"lm_head.weight"}
    own = {name.removeprefix("model."): x for name, x in weights.items() if name in names}
    headless.load_state_dict(own, assign=True)
    ids, engine.requests = torch.arange(6)[None], torch.zeros(6)
    arguments = {"use_cache": False, "return_dict": False, "attention_instances": engine}
    positions = torch.arange(6)[None]
    found = headless(ids, position_ids=positions, **arguments)[0]
    whole = model.hidden(ids, model.context(ids), Depth(N_LOOPS))
    assert (found - whole).abs().max() < 1e-5 * whole.abs().max().clamp(min=1)
    engine.kept.clear()
    embedded = headless.get_input_embeddings()(ids)
    again = headless(inputs_embeds=embedded, position_ids=positions, **arguments)[0]
    assert torch.equal(again, found)
    with pytest.raises(ConfigError, match="cannot run in another engine") as caught:
        headless(ids, position_ids=positions, exit_rule="change:0.1", **arguments)
    assert caught.value.where == "exit_rule"


def test_the_plugin_of_other_engines():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    place = project["entry-points"]["vllm.general_plugins"]["open_mythos"]
    assert EntryPoint("open_mythos", place, "vllm.general_plugins").load() is register


def test_positions_are_needed(engine):
    model = small_model("gqa").eval()
    with pytest.raises(ConfigError, match="position"):
        hidden_at_sites(
            model, torch.zeros(1, 2).long(), None, Depth(2), Sites(model.cfg, "stand_in", {})
        )
