"""Converted models compute what the forms of their families do, and say where they are from."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from interop.equality import (
    LOOPS,
    RESULTS,
    converted,
    difference,
    ids_of,
    logits_of,
    write,
)
from interop.references import FORMS, Form, example
from open_mythos import ConfigError, DataError, OpenMythos
from open_mythos.accounting import account
from open_mythos.cli.parser import parse
from open_mythos.errors import MythosError
from open_mythos.hub.pretrained import from_pretrained
from open_mythos.interop import families, read
from open_mythos.interop.convert import FAMILIES, convert, convert_source
from open_mythos.interop.read import read_source
from open_mythos.model.dense import parameter_count
from open_mythos.plan.parameters import parameters
from open_mythos.run_folder import PROVENANCE_FILE

MARK = 1e-5
every_form = pytest.mark.parametrize("name", FORMS)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[Form, OpenMythos, Path]]:
    found = {}
    for number, name in enumerate(FORMS):
        folder, form = tmp_path_factory.mktemp(str(number)), example(name)
        found[name] = form, converted(form, folder), folder
    return found


@every_form
@pytest.mark.parametrize("cached", [False, True], ids=["whole", "cached"])
def test_logits_are_those_of_the_form(models, name, cached):
    form, model, _ = models[name]
    for loops in LOOPS:
        assert difference(*logits_of(model, form, loops, cached)) <= MARK


@every_form
def test_the_mark_notices_one_wrong_weight(models, name):
    """Control: one weight of one layer, or a swapped pair of channels."""
    form, model, _ = models[name]
    block = model.recurrent.blocks[-1]
    for weight in (block.attn.q_proj.weight, block.attn_norm.weight):
        kept = weight.detach().clone()
        with torch.no_grad():
            weight[[0, 1]] = kept[[1, 0]]
        assert difference(*logits_of(model, form, 2, False)) > MARK
        with torch.no_grad():
            weight.copy_(kept)


@torch.no_grad()
def test_the_gate_of_ouro_is_kept(models):
    form, model, _ = models["ouro"]
    ids = ids_of()
    form.logits(ids, 4, torch.empty(0), {}, 0)
    for (_, h_BTD), expected in zip(model.unroll(ids, 4), form.gates, strict=True):
        torch.testing.assert_close(model.recurrent.halting(h_BTD), expected, rtol=1e-5, atol=1e-6)
    assert model.cfg.act_threshold == form.config["early_exit_threshold"]


@every_form
def test_every_parameter_of_every_family_is_counted(models, name):
    _, model, _ = models[name]
    total = parameter_count(model)
    assert account(model).parameters == total == sum(each.n for each in parameters(model.cfg))


@pytest.mark.parametrize("name", ["looped-lm, linear", "nanbeige", "huginn", "parcae"])
def test_a_gate_that_no_one_trained_says_one_half(models, name):
    _, model, _ = models[name]
    assert torch.equal(
        model.recurrent.halting(torch.randn(2, model.cfg.dim)), torch.full((2,), 0.5)
    )


@every_form
def test_a_missing_and_a_further_tensor_are_refused(models, name, tmp_path):
    folder = models[name][2]
    tensors = load_file(folder / "model.safetensors")
    of_layers = [each for each in tensors if re.search(r"\d", each)]
    for change, what in (
        ({of_layers[-1]: None}, "missing in the source"),
        ({"x": torch.ones(1)}, "left"),
    ):
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        kept = {k: v for k, v in (tensors | change).items() if v is not None}
        save_file(kept, tmp_path / "model.safetensors")
        with pytest.raises(DataError, match=what):
            convert(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


REFUSED = [
    ("ouro", {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling"),
    ("ouro", {"use_sliding_window": True}, "use_sliding_window"),
    ("ouro", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("ouro", {"hidden_act": "gelu"}, "hidden_act"),
    ("ouro", {"total_ut_steps": None}, "total_ut_steps"),
    ("ouro", {"rms_norm_eps": "small"}, "rms_norm_eps"),
    ("nanbeige", {"emb_neighbor_num": 2}, "n-gram embeddings"),
    ("nanbeige", {"enable_hyper_connection": True}, "hyper-connections"),
    ("nanbeige", {"enable_double_loop_split": True}, "some of the layers"),
    ("nanbeige", {"enable_depth_attention": True}, "attention over depth"),
    ("nanbeige", {"qk_layernorm": True}, "norms of queries"),
    ("nanbeige", {"loop_share_kv": True}, "shared between loops"),
    ("huginn", {"injection_type": "add"}, "injection_type"),
    ("huginn", {"test_time_noise": 0.1}, "test_time_noise"),
    ("huginn", {"qk_bias": False}, "qk_bias"),
    ("parcae", {"injection_type": "linear"}, "injection_type"),
    ("parcae", {"logit_softcap": 30.0}, "logit_softcap"),
    ("parcae", {"rope_settings": {"rope_condense_ratio": 2}}, "rope_condense_ratio"),
    ("looped-lm, diagonal", {"huginn_prelude_orthogonal": True}, "orthogonal injection"),
    ("looped-lm, diagonal", {"huginn_hierarchical_state": "split_hl"}, "two coupled states"),
    ("looped-lm, diagonal", {"num_experts": 8}, "mixtures of experts"),
    ("looped-lm, repeated", {"loop_input_injection": "diagonal"}, "precedes the prelude"),
    ("looped-lm, diagonal", {"qknorm": True}, "qknorm"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "what"), REFUSED)
def test_what_is_not_covered_is_refused_by_name(name, changes, what, tmp_path):
    form = example(name)
    form.config = {**form.config, **changes}
    with pytest.raises(DataError, match=what) as caught:
        convert(write(form, tmp_path / "in"), tmp_path / "out")
    assert "config.json" in caught.value.where
    assert not (tmp_path / "out").exists()


HOSTILE = [None, -1, 0, 10**9, 10**30, "x", [], {}, math.inf, math.nan, True, 1.5, [1], {"a": 1}]


@pytest.mark.parametrize("name", ["looped-lm, linear", "ouro", "nanbeige", "huginn", "parcae"])
def test_no_configuration_breaks_it(name, tmp_path):
    """Each field in turn: the model is converted, or a typed error says why not."""
    form, refused = example(name), 0
    source = read_source(write(form, tmp_path))
    fields = [*form.config, "rope_scaling", "rope_parameters", "init_values", "rope_settings"]
    for number, field in enumerate(fields):
        for value in (HOSTILE[number % len(HOSTILE)], HOSTILE[(number * 5 + 3) % len(HOSTILE)]):
            changed = {**form.config, field: value}
            config = {"model": changed} if "arch" in form.config else changed
            try:
                convert_source(replace(source, config=config))
            except MythosError:
                refused += 1
    assert refused > len(fields)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"model_type": "hrm_text"}, "two stacks"), ({"model_type": "llama"}, "retrofit"),
        ({"model": {"arch": "gekko", "loop_times": 2}}, "not a checkpoint of a known family"),
        ({}, "--family"),
    ],
)  # fmt: skip
def test_other_models_are_refused(config, what, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=what):
        convert(tmp_path, tmp_path / "out")


def test_heads_and_tables_that_differ_are_refused(tmp_path):
    for tensor, what in (("lm_head.weight", "tied"), ("freqs_cis", "rotary table")):
        form = example("huginn")
        form.w[tensor] = form.w[tensor] + 1
        with pytest.raises(DataError, match=what):
            convert(write(form, tmp_path / tensor), tmp_path / "out")


def test_decays_beyond_the_bound(tmp_path):
    form = example("parcae")
    form.w["transformer.adapter.A_log"][3] = -9.0
    folder = write(form, tmp_path / "in")
    with pytest.raises(DataError, match="beyond the bound"):
        convert(folder, tmp_path / "out")
    found = convert(folder, tmp_path / "out", allow_clamp=True)
    assert any("clamped" in note for note in found.provenance.notes)


def test_the_record(tmp_path):
    form = example("ouro")
    folder = write(form, tmp_path / "in")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    found = convert(folder, tmp_path / "out", "ouro")
    record = json.loads((tmp_path / "out" / PROVENANCE_FILE).read_text())
    assert record == json.loads(json.dumps(vars(found.provenance)))
    assert (record["family"], record["source"], record["licence"]) == ("ouro", "in", "apache-2.0")
    assert (record["trained_loops"], record["gate"]) == (4, True)
    assert len(record["sha256"]) == 64
    with pytest.raises(ConfigError, match="not empty"):
        convert(folder, tmp_path / "out")
    with pytest.raises(ConfigError, match="looped-lm, ouro"):
        convert(folder, tmp_path / "new", "urso")


def test_a_model_of_the_hub(tmp_path, monkeypatch):
    folder = write(example("nanbeige"), tmp_path / "snapshot")
    monkeypatch.setattr(read, "download", lambda *_, **__: folder)
    found = convert("owner/model", tmp_path / "out")
    assert (found.provenance.source, found.provenance.licence) == ("owner/model", None)


def test_bfloat16_takes_half_the_space(tmp_path):
    folder = write(example("looped-lm, diagonal"), tmp_path / "in")
    convert(folder, tmp_path / "out", dtype=torch.bfloat16)
    assert {x.dtype for x in from_pretrained(tmp_path / "out").parameters()} == {torch.bfloat16}


def test_the_command(tmp_path, capsys):
    folder = write(example("parcae"), tmp_path / "in")
    out = tmp_path / "out"
    command, arguments = parse(["convert", str(folder), str(out), "--allow-clamp"])
    assert command(**arguments) == 0
    printed = capsys.readouterr().out
    assert "parcae" in printed
    assert "2 + 2 x 8 loops + 2" in printed
    assert "freqs_cis" in printed
    assert from_pretrained(out).cfg.max_loop_iters == 8


def test_every_family_has_a_form():
    assert {name.partition(",")[0] for name in FORMS} == set(FAMILIES)
    modules = {path.stem for path in Path(families.__file__).parent.glob("*.py")}
    assert {name.replace("-", "_") for name in FAMILIES} == modules - {"__init__", "plan"}


def test_the_recorded_differences_are_of_these_forms_and_within_the_mark():
    recorded = json.loads(RESULTS.read_text())
    assert recorded["loops"] == list(LOOPS)
    assert list(recorded["differences"]) == list(FORMS)
    for kinds in recorded["differences"].values():
        assert all(max(values) <= MARK for values in kinds.values())
