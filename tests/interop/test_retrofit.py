"""Dense models of transformers become ours, and looped ones that equal them at one loop."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml

from open_mythos import ConfigError, OpenMythos
from open_mythos.cli import main
from open_mythos.errors import DataError, EnvironmentError_
from open_mythos.hub.pretrained import from_pretrained, save_pretrained
from open_mythos.interop.dense import from_transformers
from open_mythos.interop.dense_source import read_dense
from open_mythos.interop.healing import healing_run
from open_mythos.interop.retrofit import MODES, Split, compare, default_split, retrofit
from open_mythos.train import RunConfig, build_model

from .dense_models import FAMILIES, SIZES, dense_model, words

N_LAYERS = SIZES["num_hidden_layers"]
SPLIT = Split.of(N_LAYERS, 2, 2, 2)
IDS = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(1))
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def dense():
    return from_transformers(dense_model("llama, tied"))


@families
@torch.no_grad()
def test_logits_are_those_of_transformers(family):
    theirs = dense_model(family)
    expected = theirs(IDS).logits
    found = from_transformers(theirs)(IDS)
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@families
def test_one_loop_is_exactly_the_dense_model(family):
    model = from_transformers(dense_model(family))
    for mode in MODES:
        found = compare(model, retrofit(model, SPLIT, mode=mode), SPLIT)
        assert (found.state, found.logits) == (0.0, 0.0)


@torch.no_grad()
def test_more_loops_differ_and_each_mode_in_its_own_way(dense):
    """Control: the loop runs again."""
    expected = dense(IDS)
    moved = {
        mode: float((retrofit(dense, SPLIT, mode=mode)(IDS, 4) - expected).abs().max())
        for mode in MODES
    }
    assert len(set(moved.values())) == len(MODES)
    assert min(moved.values()) > 1e-2


@torch.no_grad()
def test_modes_follow_their_equations(dense):
    ids, n_loops, a = IDS[:1], 3, 0.5
    ctx = dense.context(ids)
    e = dense.embedding(ids)
    for block in dense.blocks[:2]:
        e = block(e, ctx)
    for mode in MODES:
        h = torch.zeros_like(e) if mode == "zero" else e
        for t in range(n_loops):
            y = a * h + (e if mode == "zero" else (1 - a) * e)
            for block in dense.blocks[2:4]:
                y = block(y, ctx)
            h = h + (y - h) / (t + 1) if mode == "damped" else y
        for block in dense.blocks[4:]:
            h = block(h, ctx)
        expected = dense.head(dense.final_norm(h))
        found = retrofit(dense, SPLIT, mode=mode)(ids, n_loops)
        assert (found - expected).abs().max() <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("decay", [0.1, 0.25, 0.9])
def test_the_start_is_dense_for_every_decay(dense, decay):
    for mode in MODES:
        model = retrofit(dense, SPLIT, mode=mode, decay=decay)
        found = compare(dense, model, SPLIT)
        assert found.logits <= 1e-5 * found.largest_logit
        torch.testing.assert_close(model.recurrent.injection.decay(), torch.full((32,), decay))


def test_dropping_layers_is_asked_for_and_not_dense(dense):
    with pytest.raises(ConfigError, match="2 \\+ 2 \\+ 1 of 6 layers, without 2") as caught:
        Split.of(N_LAYERS, 2, 2, 1)
    assert "--drop" in str(caught.value)
    split = Split.of(N_LAYERS, 2, 2, 1, drop=True)
    assert split.dropped == [2]
    assert list(split.places.values()) == [0, 1, 3, 4, 5]
    found = compare(dense, retrofit(dense, split), split)
    assert found.state == 0
    assert found.logits > 1e-2


def test_layers_keep_what_is_their_own():
    """Left-out layers move the settings of those behind them."""
    dense = from_transformers(dense_model("gemma3"))
    assert sorted(dense.cfg.layer_overrides) == ["2", "5"]
    split = Split.of(N_LAYERS, 1, 2, 1, loop_from=2, drop=True)  # layers 0, 2, 3, 5
    looped = retrofit(dense, split)
    assert looped.cfg.layer_overrides == {
        "1": dense.cfg.layer_overrides["2"], "3": dense.cfg.layer_overrides["5"]
    }  # fmt: skip
    assert compare(dense, looped, split).state == 0


def test_code_beside_a_model_is_never_run_or_asked_about(tmp_path, monkeypatch):
    """``transformers`` asks on the terminal, where a word of habit runs it."""
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(DataError, match="no dense model"):
        read_dense(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_parts_do_not_overlap():
    for parts in ((3, 2, 2), (2, 2, 2, 1), (2, 2, 2, 3)):
        with pytest.raises(ConfigError, match="the parts overlap"):
            Split.of(N_LAYERS, *parts, drop=True)


def test_defaults_keep_all_layers():
    assert default_split(30, None, 4, None) == Split(30, 8, 4, 18, 8)
    assert default_split(30, 13, 4, None) == Split(30, 13, 4, 13, 13)
    assert default_split(30, None, 4, 18) == Split(30, 8, 4, 18, 8)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"hidden_act": "relu"}, "hidden_act"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
         "rope_type"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ],
)  # fmt: skip
def test_settings_without_a_counterpart_are_refused_by_name(family, changes, named):
    with pytest.raises(DataError, match=f"{named} is not covered"):
        from_transformers(dense_model(family, **changes))


def test_other_families_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(ConfigError, match="family of dense models"):
        from_transformers(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)))


def test_left_over_weights_are_refused():
    model = dense_model("llama")
    model.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(DataError, match="left over in the source: extra"):
        from_transformers(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    dense_model("llama, tied", vocab_size=128).save_pretrained(path)
    words().save_pretrained(path)
    return path


def test_the_tokenizer_does_not_outgrow_the_vocabulary(folder):
    source = read_dense(str(folder))
    found = source.tokenizer
    assert (found.eos_id, found.bos_id, found.pad_id) == (2, 1, 0)
    assert len(found) == 93
    assert found.encode("w0 w2") == [3, 5]
    assert source.notes == ("pad is '<unk>'; the source has '</s>'",)


def test_special_tokens_are_those_that_transformers_finds(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "in")
    config = json.loads((tmp_path / "in" / "tokenizer_config.json").read_text())
    parts = {name: config.pop(name) for name in ("bos_token", "eos_token", "pad_token")}
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "in" / "special_tokens_map.json").write_text(json.dumps(parts))
    found = read_dense(str(tmp_path / "in")).tokenizer
    assert (found.eos_id, found.bos_id, found.pad_id) == (2, 1, 0)


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("tokenizer.json", "{}", "no tokenizer is stored: tokenizer.json"),
        ("tokenizer_config.json", '{"tokenizer_class": 7}', "no tokenizer is stored: in: "),
        ("tokenizer_config.json", "[]", "no tokenizer is stored: tokenizer_config.json"),
        ("", "", "the source has no tokenizer"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_left_out_and_said(
    folder, tmp_path, name, content, note
):
    shutil.copytree(folder, tmp_path / "in")
    if name:
        (tmp_path / "in" / name).write_text(content)
    else:
        for file in (tmp_path / "in").glob("*token*"):
            file.unlink()
    (tmp_path / "in" / "LICENSES").mkdir()  # what transformers does not read is not looked at
    found = read_dense(str(tmp_path / "in"))
    assert found.tokenizer is None
    assert found.notes[0].startswith(note)


def test_the_command_writes_a_model_that_trains(folder, tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "looped"
    text.write_text("\n".join(" ".join(f"w{(i * j) % 90}" for j in range(12)) for i in range(400)))
    parts = ["--prelude", "2", "--loop", "2", "--coda", "2", "--dense", str(tmp_path / "dense")]
    check = ["--check", str(text), "--json", "--heal-steps", "30"]
    assert main(["retrofit", str(folder), str(out), *parts, *check]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["difference"]["logits"] == 0
    assert record["check"]["losses"]["1"] == pytest.approx(record["check"]["dense"], abs=1e-6)
    assert record["layers"]["recurrent.blocks.0"] == 2
    assert json.loads((out / "retrofit.json").read_text())["family"] == "llama"
    model = from_pretrained(out)
    assert isinstance(model, OpenMythos)
    with torch.no_grad():
        same = from_pretrained(tmp_path / "dense")(IDS)
        assert torch.equal(model(IDS, 1), same)
    sizes = ["seq_len 32", "global_batch 2", "micro_batch 1", "save_every 0", "eval_every 0",
             "eval_depths [1,2]"]  # fmt: skip
    changes = [word for each in sizes for word in f"--train.{each}".split()]
    teacher = ["--train.teacher", str(tmp_path / "dense"), "--train.dtype", "float32"]
    run = ["--train.out_dir", str(tmp_path / "run"), "--data.workers", "0", "--quiet"]
    rates = ["--optim.lr", "3e-3", "--optim.adamw_lr", "1e-3"]
    heal = ["train", "--config", str(out / "heal.yaml"), "--source", str(text), *rates]
    assert main([*heal, *changes, *teacher, *run, "--data.val", str(text)]) == 0
    assert json.loads((tmp_path / "run" / "retrofit.json").read_text())["family"] == "llama"
    healed = from_pretrained(tmp_path / "run")
    assert healed.cfg == model.cfg
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (_, two) = json.loads(lines[-1])["eval/depths"]
    assert two["depth"] == 2
    assert two["loss"] < record["check"]["losses"]["2"] - 0.1
    assert not torch.equal(healed.coda[0].ffn.down.weight, model.coda[0].ffn.down.weight)


def test_the_table_of_the_command(folder, tmp_path, capsys):
    options = ["--prelude", "1", "--loop", "2", "--coda", "2", "--drop", "--dtype", "bfloat16"]
    assert main(["retrofit", str(folder), str(tmp_path / "out"), *options]) == 0
    shown = "".join(capsys.readouterr().out.split())  # lines are broken anywhere
    assert "leftout" in shown
    assert "heal.yaml" in shown
    assert from_pretrained(tmp_path / "out").head.weight.dtype == torch.bfloat16
    assert "--train.teacher" not in (tmp_path / "out" / "heal.yaml").read_text()


def test_a_folder_that_holds_something_is_left_alone(folder, tmp_path, capsys):
    (tmp_path / "mine").write_text("kept")
    for options in ([str(tmp_path)], [str(tmp_path / "out"), "--dense", str(tmp_path)]):
        assert main(["retrofit", str(folder), *options]) == 2
        assert "the folder is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_heal_yaml_is_the_recipe(dense, tmp_path):
    cfg = retrofit(dense, SPLIT).cfg
    run = healing_run(cfg, "folder", steps=400)
    run.validate()
    assert (run.depth.mean, run.depth.curriculum_steps, run.train.grad_loops) == (4.0, 100, 8)
    again = RunConfig.from_dict(yaml.safe_load(yaml.safe_dump(run.to_dict())))
    assert again == run
    assert build_model(run).cfg == cfg


@pytest.mark.parametrize(("model", "gguf"), [("nowhere", ""), ("{}", ""), ("{}", "x.gguf")])
def test_sources_that_are_none(model, gguf, tmp_path):
    with pytest.raises(DataError, match="no dense model"):
        read_dense(model.format(tmp_path), gguf)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"model_type": [[]]}', "{}", "\\x80"])
def test_configurations_that_are_none(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(DataError, match="no dense model"):
        read_dense(str(tmp_path))


def test_a_model_of_the_hub(folder, tmp_path, monkeypatch):
    asked = []

    def snapshot(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(name)
        if name != "owner/name":
            raise OSError("no route")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    source = read_dense("owner/name")
    assert (source.name, source.model.config.model_type) == ("owner/name", "llama")
    with pytest.raises(EnvironmentError_, match="no route") as caught:
        read_dense("owner/other")
    assert "--local-dir" in str(caught.value)
    assert asked == ["owner/name", "owner/other"]


def test_state_dict_round_trip(dense, tmp_path):
    model = retrofit(dense, SPLIT, mode="damped")
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path)
    assert again.cfg == model.cfg
    with torch.no_grad():
        assert torch.equal(again(IDS, 3), model(IDS, 3))
