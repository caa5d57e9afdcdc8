"""Tasks of lm-evaluation-harness by depth, against the same sums by hand."""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import small_model

from open_mythos import ConfigError, DenseTransformer, save_pretrained
from open_mythos.cli import main
from open_mythos.errors import EnvironmentError_
from open_mythos.evaluation.harness import HarnessModel, evaluate_tasks
from open_mythos.model.depth import Depth
from open_mythos.model.generation import generate
from open_mythos.ops.sampling import SamplingParams
from open_mythos.run_folder import TOKENIZER_FOLDER
from open_mythos.tokenizer import ByteTokenizer

TOK = ByteTokenizer()
CHOICE = """
task: sums
dataset_path: json
dataset_kwargs:
  data_files: {folder}/sums.jsonl
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
ROLLING = """
task: lines
dataset_path: json
dataset_kwargs:
  data_files: {folder}/sums.jsonl
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{q}}}}"
metric_list:
  - metric: byte_perplexity
"""
GENERATED = """
task: written
dataset_path: json
dataset_kwargs:
  data_files: {folder}/sums.jsonl
test_split: train
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{said}}}}"
generation_kwargs:
  until: ["\n"]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def model():
    return small_model("gqa", vocab_size=TOK.vocab_size, max_seq_len=48, n_experts=0)


def said(model, question: str, loops: int) -> str:
    ids = TOK.encode(question)
    params = SamplingParams(4, temperature=0.0, stop="\n", eos_token_id=TOK.eos_id)
    out = generate(model, torch.tensor([ids]), params, Depth(loops), tokenizer=TOK)
    return TOK.decode(out[0, len(ids) :].tolist()).partition("\n")[0]


def nats(model, context: str, new: str, loops: int) -> float:
    ids = TOK.encode(context + new)
    logits = model(torch.tensor([ids]), n_loops=loops)[0].log_softmax(-1)
    n = len(TOK.encode(new))
    return sum(logits[i - 1, ids[i]].item() for i in range(len(ids) - n, len(ids)))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """Three tasks on six documents; the answers of "written" are those at 2 loops."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {"q": f"{i}+{i}=", "choices": [f" {2 * i}", f" {i + 7}, or more"], "answer": 0,
         "said": said(model, f"{i}+{i}=", 2)} for i in range(6)
    ]  # fmt: skip
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, documents)))
    for name, text in (("sums", CHOICE), ("lines", ROLLING), ("written", GENERATED)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    # read at import: the environment would come too late
    monkeypatch.setattr("datasets.config.HF_UPDATE_DOWNLOAD_COUNTS", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@torch.no_grad()
def test_metrics_by_depth(model, folder):
    tasks = [str(folder / f"{name}.yaml") for name in ("sums", "lines", "written")]
    rows = {(r.task, r.depth): r for r in evaluate_tasks(model, TOK, tasks, [1, 2], batch=4)}
    documents = [json.loads(line) for line in (folder / "sums.jsonl").read_text().splitlines()]
    for loops in (1, 2):
        right = [
            nats(model, d["q"], d["choices"][0], loops)
            > nats(model, d["q"], d["choices"][1], loops)
            for d in documents
        ]
        assert rows["sums", loops].value == pytest.approx(sum(right) / 6)
        start = [
            model(torch.tensor([[TOK.eos_id, *TOK.encode(d["q"])]]), n_loops=loops)[0]
            for d in documents
        ]
        whole = sum(
            x.log_softmax(-1)[i, token].item()
            for x, d in zip(start, documents, strict=True)
            for i, token in enumerate(TOK.encode(d["q"]))
        )
        n_bytes = sum(len(d["q"]) for d in documents)
        assert rows["lines", loops].value == pytest.approx(math.exp(-whole / n_bytes), rel=1e-5)
        same = [said(model, d["q"], loops) == d["said"] for d in documents]
        assert rows["written", loops].value == pytest.approx(sum(same) / 6)
    assert rows["written", 2].value == 1
    assert rows["sums", 1].documents == 6


@torch.no_grad()
def test_batched_is_alone_and_long_contexts_lose_their_beginning(model):
    pairs = [("", TOK.encode("abc" * n), TOK.encode("xyz")) for n in (1, 5, 40, 2)]
    together = HarnessModel(model, TOK, 3, batch=4)._loglikelihood_tokens(pairs)
    alone = HarnessModel(model, TOK, 3, batch=1)
    for pair, (found, greedy) in zip(pairs, together, strict=True):
        ((expected, same),) = alone._loglikelihood_tokens([pair])
        assert found == pytest.approx(expected, abs=1e-4)
        assert greedy == same
    room = model.cfg.max_seq_len
    kept = (pairs[2][1] + pairs[2][2])[-room - 1 :]
    logits = model(torch.tensor([kept[:-1]]), n_loops=3)[0].log_softmax(-1)
    assert together[2][0] == pytest.approx(
        sum(logits[i - 1, kept[i]].item() for i in range(room - 2, room + 1)), abs=1e-4
    )


def test_greedy_continuations_are_known(model):
    loops = 2
    first = said(model, "7+1=", loops)
    asked = [("", TOK.encode("7+1="), TOK.encode(text)) for text in (first, first[:-1] + "~")]
    found = HarnessModel(model, TOK, loops)._loglikelihood_tokens(asked)
    assert [greedy for _, greedy in found] == [True, False]


def test_settings_of_generation(model):
    adapter = HarnessModel(model, TOK, 2)
    request = SimpleNamespace(
        args=("ab", {"until": ["c", ""], "temperature": 0.5, "do_sample": True})
    )
    params = adapter._params(request.args[1])
    assert (params.temperature, tuple(params.stop)) == (0.5, ("c",))
    greedy = adapter._params({"do_sample": False, "temperature": 0.9})
    assert greedy.temperature == 0
    assert len(adapter.generate_until([request, request])) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_dense_model_is_measured_once(folder, model):
    dense = DenseTransformer(model.cfg, 2).eval()
    rows = evaluate_tasks(dense, TOK, [str(folder / "sums.yaml")], [1, 2], limit=2)
    assert [(row.depth, row.documents) for row in rows] == [(None, 2)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_command(model, folder, tmp_path, capsys):
    checkpoint, out, plot = tmp_path / "model", tmp_path / "rows.json", tmp_path / "tasks.png"
    save_pretrained(model, checkpoint)
    TOK.save(checkpoint / TOKENIZER_FOLDER)
    words = ["evaluate", str(checkpoint), "--tasks", str(folder / "sums.yaml"), "--quiet", "true"]
    assert main([*words, "--depths", "[1,3]", "--out", str(out), "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    lines = printed.replace("│", "|").splitlines()  # a console may draw ASCII only
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[:4] for row in cells if len(row) == 6] == [
        ["sums", "6", "acc", "1"], ["", "", "", "3"],
    ]  # fmt: skip
    rows = json.loads(out.read_text())["rows"]
    assert [(row["task"], row["metric"], row["depth"]) for row in rows] == [
        ("sums", "acc", 1), ("sums", "acc", 3),
    ]  # fmt: skip
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.filterwarnings("ignore")
def test_the_harness_s_own_command_agrees(model, folder, tmp_path):
    """``lm_eval --model hf``: the same model through transformers."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from open_mythos.hf import register

    register()
    save_pretrained(model, tmp_path / "hf", format="hf", tokenizer=TOK)
    tasks = [str(folder / f"{name}.yaml") for name in ("sums", "lines", "written")]
    loops = 3
    theirs = simple_evaluate(
        model="hf", device="cpu", tasks=tasks, batch_size=4, bootstrap_iters=10,
        model_args={"pretrained": str(tmp_path / "hf"), "n_loops": loops, "backend": "causal",
                    "prefix_token_id": TOK.eos_id},
        task_manager=TaskManager(include_defaults=False),
    )["results"]  # fmt: skip
    for row in evaluate_tasks(model, TOK, tasks, [loops]):
        assert theirs[row.task][f"{row.metric},none"] == pytest.approx(row.value, rel=1e-5), row


def test_bad_input(model, folder, tmp_path, capsys):
    with pytest.raises(ConfigError, match="no such task"):
        evaluate_tasks(model, TOK, [str(folder / "absent.yaml")], [1])
    with pytest.raises(ConfigError, match="depths"):
        evaluate_tasks(model, TOK, [str(folder / "sums.yaml")], [0])
    with pytest.raises(ConfigError, match="no depth"):
        evaluate_tasks(model, TOK, [str(folder / "sums.yaml")], [])
    checkpoint = tmp_path / "model"
    save_pretrained(model, checkpoint)
    TOK.save(checkpoint / TOKENIZER_FOLDER)
    assert main(["evaluate", str(checkpoint), "--plot", "a.png"]) == 2
    assert "together with --tasks" in capsys.readouterr().err
    words = ["evaluate", str(checkpoint), "--tasks", str(folder / "sums.yaml")]
    for option, value in (("--exit", "gate"), ("--dtype", "bfloat16"), ("--data", "shards")):
        assert main([*words, option, value]) == 2
        assert "tasks do not read this" in capsys.readouterr().err
    assert main([*words, "--plot", str(tmp_path / "a.gif")]) == 2
    assert main([*words, "--plot", str(tmp_path / "absent" / "a.png")]) == 4


def test_without_the_package(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "open_mythos.evaluation.harness", None)
    checkpoint = tmp_path / "model"
    save_pretrained(model, checkpoint)
    TOK.save(checkpoint / TOKENIZER_FOLDER)
    assert main(["evaluate", str(checkpoint), "--tasks", "arc_easy"]) == EnvironmentError_.exit_code
    assert "open-mythos[eval]" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["process_docs: !function evil.run", "include: ../other.yaml"])
def test_a_task_that_runs_code_is_refused(tmp_path, line):
    """The harness would import the Python file beside it."""
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    (tmp_path / "task.yaml").write_text(f"task: evil\n{line}\n")
    with pytest.raises(ConfigError, match="run code"):
        evaluate_tasks(small_model(), ByteTokenizer(), [str(tmp_path / "task.yaml")], [1])
