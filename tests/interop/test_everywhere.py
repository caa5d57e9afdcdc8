"""Converted models run wherever models of this library run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from interop.checkpoints import VOCAB
from interop.equality import ids_of, write
from interop.references import example
from open_mythos import Depth, OpenMythos, SamplingParams
from open_mythos.cli.parser import parse
from open_mythos.data.batch import Batch
from open_mythos.dynamics import StepJacobian, run_trajectory
from open_mythos.evaluation import evaluate_depths, evaluate_exits
from open_mythos.hub.places import stored_tokenizer
from open_mythos.hub.pretrained import from_pretrained, save_pretrained
from open_mythos.inference import check
from open_mythos.inference.decoding import decoder_factory
from open_mythos.inference.quantization import quantize
from open_mythos.interop.convert import convert
from open_mythos.model.exit_rules import exit_rule
from open_mythos.model.generation import generate
from open_mythos.train.gate import GateConfig, train_gate
from open_mythos.train.loss import next_token_loss

NAMES = ["looped-lm, linear", "looped-lm, parcae", "ouro", "nanbeige", "huginn", "parcae"]
WORDS = ["a", "loop", "runs", "again", "and", "ends"]
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
every = pytest.mark.parametrize("name", NAMES)


def tokenizer() -> str:
    """A ``tokenizer.json`` of a few words and special tokens."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    rust = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    rust.add_special_tokens(
        [AddedToken(name, special=True) for name in ("<|end|>", "<|start|>", "<|other|>")]
    )
    return rust.to_str()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    found = {}
    for name in NAMES:
        place = tmp_path_factory.mktemp("folder")
        source = write(example(name), place / "in")
        (source / "tokenizer.json").write_text(tokenizer())
        shared = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|end|>")
        shared["chat_template"] = TEMPLATE
        (source / "tokenizer_config.json").write_text(json.dumps(shared))
        found[name] = place / "out"
        convert(source, found[name])
    return found


@pytest.fixture
def model(folders, name) -> OpenMythos:
    return from_pretrained(folders[name])


def batch() -> Batch:
    ids = ids_of()
    return Batch(ids[:, :-1], ids[:, 1:].clone(), None, torch.arange(len(ids)))


def run(*words: object) -> int:
    command, arguments = parse([str(word) for word in words])
    return command(**arguments)


@every
def test_generation_with_and_without_a_cache_and_in_static_shape(model, name):
    ids, params = ids_of()[:, :9], SamplingParams(6, temperature=0.0)
    cached = generate(model, ids, params, Depth(3))
    assert torch.equal(
        generate(model, ids, params, Depth(3), decoder=decoder_factory("static")), cached
    )
    if model.cfg.kv_share == "none":  # else the cache is an approximation, the original's own
        plain = generate(
            model, ids, params, Depth(3), decoder=decoder_factory("eager", use_cache=False)
        )
        assert torch.equal(plain, cached)


@every
def test_the_engine_continues_as_generate(model, name):
    assert not any(check.parity(model, 3, 3))
    assert not any(check.schedules(model, 1, 3))


@every
def test_evaluation_and_exits(model, name):
    rows = evaluate_depths(model, [batch()], [1, 3])
    part = batch()
    with torch.no_grad():
        logits = model(part.input_ids, 3).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, part.targets.flatten()).item()
    assert rows[-1].loss == pytest.approx(expected, rel=1e-5)
    for rule in ("gate:0.6", "kl:0.01"):
        report = evaluate_exits(model, [batch()], exit_rule(rule, model), 3)
        assert sum(report.histogram) == part.targets.numel()


@every
def test_training_goes_on(model, name):
    model.train()
    weights = [p for key, p in model.named_parameters() if "halting" not in key]
    optimizer, losses = torch.optim.AdamW(weights, lr=3e-3), []
    for _ in range(8):
        part = batch()
        loss = next_token_loss(
            model, part.input_ids, part.targets, step_tokens=part.targets.numel(),
            step_sequences=2, depth=Depth([2, 3], grad_loops=2),
        )  # fmt: skip
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.total.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(p.grad is not None for p in weights)


@every
def test_the_gate_can_be_trained(model, name):
    report = train_gate(model, [batch()], GateConfig(n_loops=3, positions=40, steps=20))
    assert report.curve[-1] < report.curve[0]


@every
def test_quantized(model, name):
    ids = ids_of()
    with torch.no_grad():
        exact = model(ids, 3)
        rounded = quantize(model, "int8")(ids, 3).float()
    assert (rounded - exact).norm() < 0.15 * exact.norm()


@every
def test_through_transformers(model, name, tmp_path):
    hf = pytest.importorskip("open_mythos.hf")
    pytest.importorskip("transformers")
    save_pretrained(model, tmp_path, format="hf")
    theirs = hf.OpenMythosForCausalLM.from_pretrained(tmp_path).eval()
    ids = ids_of()
    with torch.no_grad():
        assert torch.equal(theirs(ids, n_loops=3).logits, model(ids, 3))
    mine = generate(model, ids[:, :8], SamplingParams(5, temperature=0.0), Depth(3))
    assert torch.equal(
        theirs.generate(ids[:, :8], max_new_tokens=5, do_sample=False, n_loops=3), mine
    )


@every
def test_its_dynamics(model, name):
    path = run_trajectory(model, ids_of(), 3)
    assert path.change().isfinite().all()
    ids = ids_of()[:1, :4]
    jacobian = StepJacobian(model, ids, path.states_LBTD[1, :1, :4], 1)
    with torch.no_grad():
        step = 1e-2 * torch.randn(1, 4, model.cfg.dim, generator=torch.Generator().manual_seed(0))
        ctx = model.context(ids)
        e_BTD, at = model.embed(ids, ctx), path.states_LBTD[1, :1, :4]
        ends = [model.step(at + sign * step, e_BTD, 1, ctx) for sign in (1, -1)]
    expected = (ends[0] - ends[1]) / 2
    assert (jacobian.apply(step) - expected).norm() < 0.01 * expected.norm()


@every
def test_the_commands(folders, name, tmp_path, capsys):
    """One tokenizer for all parts: bos and pad got tokens that were free."""
    folder, out = folders[name], tmp_path / "page.html"
    found = stored_tokenizer(folder)
    assert len({found.bos_id, found.eos_id, found.pad_id}) == 3
    assert len(found) <= VOCAB
    assert found.decode([found.eos_id, *found.encode("a loop runs")]) == "a loop runs"
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    record = json.loads((folder / "provenance.json").read_text())
    assert [note.split()[0] for note in record["notes"][-2:]] == ["bos", "pad"]
    assert run("trace", folder, "a loop runs again", "--n-loops", 3, "--out", out) == 0
    assert "again" in out.read_text()
    assert run("generate", folder, "a loop", "--max-new-tokens", 4, "--n-loops", 2) == 0
    assert run("info", folder) == 0
    assert capsys.readouterr().out


def test_a_run_that_continues_keeps_origin_and_template(folders, tmp_path):
    """Though the model has fewer ids than the multiple of 64 above those of the tokenizer."""
    text = tmp_path / "text.txt"
    text.write_text("a loop runs again and ends\n" * 60)
    sizes = ["steps 2", "seq_len 8", "global_batch 2", "eval_every 0"]
    options = [word for each in sizes for word in f"--train.{each}".split()]
    places = ["--source", text, "--train.out_dir", tmp_path / "run", "--data.workers", 0]
    assert run("train", "--checkpoint", folders["ouro"], *options, *places, "--quiet") == 0
    for name in ("provenance.json", "chat_template.jinja"):
        assert (tmp_path / "run" / name).read_text() == (folders["ouro"] / name).read_text()
    assert run("export", tmp_path / "run", "--out", tmp_path / "out") == 0
    assert 'plan "mixed"' in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE


def test_a_tokenizer_that_does_not_fit_is_not_stored(tmp_path):
    source = write(example("parcae"), tmp_path / "in")
    rust = json.loads(tokenizer())
    rust["model"]["vocab"] |= {f"word{i}": 100 + i for i in range(3)}
    (source / "tokenizer.json").write_text(json.dumps(rust))
    notes = convert(source, tmp_path / "out").provenance.notes
    assert any("not stored" in note for note in notes)
    assert not (tmp_path / "out" / "tokenizer").exists()
