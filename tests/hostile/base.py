"""A folder with one good file of every kind that a command reads, and the commands that read it."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file

from experiments.tasks import PermHop
from experiments.tasks.saved import save_task
from open_mythos import MythosConfig, OpenMythos, save_pretrained
from open_mythos.cli import main
from open_mythos.data import read_documents
from open_mythos.hub.sharded_tensors import write_shards
from open_mythos.tokenizer import BPETokenizer

STEP = "run/checkpoints/step_00000002"
TRAIN = (
    "train --variant nano --model.dim 32 --model.n_experts 2 --model.n_experts_per_tok 1 "
    "--data.path shards --train.out_dir run --train.steps {} --train.warmup_steps 1 "
    "--train.seq_len 16 --train.global_batch 2 --data.eval_windows 2 --train.eval_depths [1] "
    "--train.schedule constant --optim.ema_decay 0.9 --quiet"
)
GENERATE = "generate run ab --max-new-tokens 1 --n-loops 1 --quiet"
EVALUATE = "evaluate run --windows 1 --depths [1] --quiet --out rows.json"
RESUME = TRAIN.format(3) + " --resume latest --allow train.steps"
BPE = f"{GENERATE} --tokenizer bpe"
ANSWERS = "evaluate run --questions questions.jsonl --depths [1] --quiet"
SERVE = "serve run --port 70000"  # which is no port: the files have been read by then
PARTS = "evaluate parts --data shards --depths [1] --quiet"
SHARDED = "evaluate sharded --data shards --depths [1] --quiet"
SHARD = "shard-00001-model-00001-of-00001.safetensors"
CONVERT, RETROFIT = "convert foreign converted", "retrofit dense looped"
PREPARE = "data prepare source prepared --quiet --val-fraction 0.4"


class File(NamedTuple):
    """A file that commands read."""

    path: str
    kind: str
    """Which hostilities fit: json, yaml, jsonl, text, tensors, binary, gz, parquet."""
    commands: tuple[str, ...]


FILES = (
    File("run/run.yaml", "yaml", ("report run", EVALUATE, "info run/run.yaml")),
    File("run/run.yaml", "yaml", ("train --config run/run.yaml --train.out_dir new --dry-run",)),
    File(f"{STEP}/config.json", "json", (GENERATE, "info run", "plan run --gpus 1")),
    File(f"{STEP}/state.json", "json", (RESUME, "report run", GENERATE)),
    File(f"{STEP}/manifest.json", "json", (RESUME,)),
    File(f"{STEP}/model.safetensors", "tensors", (GENERATE + " --weights raw", RESUME)),
    File(f"{STEP}/average.safetensors", "tensors", (GENERATE,)),
    File(f"{STEP}/optimizer.safetensors", "tensors", (RESUME,)),
    File("run/metrics.jsonl", "jsonl", ("report run", RESUME)),
    File("run/tokenizer/tokenizer_config.json", "json", (GENERATE,)),
    File("run/gate.json", "json", ("trace run ab --exit gate --out page.html",)),
    File("run/provenance.json", "json", ("export run --out exported", GENERATE + " --exit gate")),
    File("run/retrofit.json", "json", ("export run --out exported",)),
    File("run/chat_template.jinja", "template", ("export run --out exported",)),
    File("bpe/tokenizer.json", "json", (BPE, f"{PREPARE} --tokenizer bpe")),
    File("shards/index.json", "json", (f"{EVALUATE} --data shards", RESUME)),
    File("shards/train-00000.tokens.bin", "binary", (f"{EVALUATE} --data shards --split train",)),
    File("shards/train-00000.starts.bin", "binary", (f"{EVALUATE} --data shards --split train",)),
    File("source/a.txt", "text", (PREPARE,)),
    File("source/b.jsonl", "jsonl", (PREPARE,)),
    File("source/c.parquet", "parquet", (PREPARE,)),
    File("packed/a.txt.gz", "gz", ("data prepare packed prepared --quiet",)),
    File("packed/a.jsonl.zst", "gz", ("data prepare packed/a.jsonl.zst prepared --quiet",)),
    File("questions.jsonl", "jsonl", (ANSWERS,)),
    File("hf/config.json", "json", ("generate hf ab --max-new-tokens 1 --n-loops 1 --quiet",)),
    File("hf/model.safetensors", "tensors", ("evaluate hf --data shards --depths [1] --quiet",)),
    File("hf/validated_depths.json", "json", ("evaluate hf --data shards --depths [3] --quiet",)),
    File("parts/model.safetensors.index.json", "json", (PARTS,)),
    File("parts/model-1.safetensors", "tensors", (PARTS,)),
    File(f"sharded/{SHARD}", "tensors", (SHARDED, f"{SHARDED} --weights raw")),
    File("keys.txt", "text", ("serve nowhere --api-key-file keys.txt",)),
    File("template.jinja", "template", (f"{SERVE} --chat-template template.jinja",)),
    File("run/chat_template.jinja", "template", (SERVE,)),
    File("chains/task.json", "json", ("experiments trace chains e1 --n-loops 1",)),
    File("chains/tokenizer/tokenizer.json", "json", ("experiments trace chains e1 --n-loops 1",)),
    File("options.yaml", "yaml", ("generate run ab --config options.yaml",)),
    File("serve.yaml", "yaml", (f"{SERVE} --config serve.yaml",)),
    File("foreign/config.json", "json", (CONVERT, "retrofit foreign looped")),
    File("foreign/model.safetensors.index.json", "json", (CONVERT,)),
    File("foreign/model-1.safetensors", "tensors", (CONVERT,)),
    File("foreign/tokenizer.json", "json", (CONVERT,)),
    File("foreign/tokenizer_config.json", "json", (CONVERT,)),
    File("foreign/special_tokens_map.json", "json", (CONVERT,)),
    File("foreign/generation_config.json", "json", (CONVERT,)),
    File("foreign/LICENSE", "text", (CONVERT,)),
    File("foreign/README.md", "text", (CONVERT,)),
    File("foreign/chat_template.jinja", "template", (CONVERT,)),
    File("dense/config.json", "json", (RETROFIT,)),
    File("dense/model.safetensors", "tensors", (RETROFIT,)),
    File("dense/tokenizer.json", "json", (RETROFIT,)),
    File("dense/tokenizer_config.json", "json", (RETROFIT,)),
    File("dense/generation_config.json", "json", (RETROFIT,)),
    File("dense/chat_template.jinja", "template", (RETROFIT,)),
    File("check.txt", "text", (f"{RETROFIT} --check check.txt",)),
)  # fmt: skip
"""A new file that a command reads is one more line."""


def make(folder: Path) -> None:
    """Make the good folder; the present folder must be ``folder``."""
    (folder / "source").mkdir()
    for i in range(12):
        (folder / "source" / f"{i}.txt").write_text(f"text {i}\n" * 40)
    if main(["data", "prepare", "source", "shards", "--quiet", "--val-fraction", "0.4"]):
        raise SystemExit("the good shards cannot be made")
    if main(TRAIN.format(2).split()):
        raise SystemExit("the good run cannot be made")
    BPETokenizer.train(read_documents("source"), 300).save(folder / "bpe")
    (folder / "source" / "a.txt").write_text("a text\n" * 20)
    (folder / "source" / "b.jsonl").write_text('{"text": "a text"}\n' * 20)
    _parquet(folder / "source" / "c.parquet")
    (folder / "packed").mkdir()
    (folder / "packed" / "a.txt.gz").write_bytes(gzip.compress(b"a text\n" * 20))
    (folder / "packed" / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(40))
    (folder / "questions.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' * 2)
    (folder / "options.yaml").write_text("max_new_tokens: 1\nn_loops: 1\nquiet: true\n")
    run = folder / "run"
    (run / "gate.json").write_text(json.dumps({"exit": "gate:0.5", "loops": 2, "steps": 1}))
    origin = {"family": "ouro", "source": "a/b", "licence": "mit", "gate": True, "notes": []}
    (run / "provenance.json").write_text(json.dumps(origin))
    (run / "retrofit.json").write_text(json.dumps({"source": "a/b", "mode": "convex", "loop": 2}))
    (run / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    if main(["export", "run", "--out", "hf"]):
        raise SystemExit("the good folder for transformers cannot be made")
    (folder / "serve.yaml").write_text("engine: {slots: 2}\nlimits: {body_bytes: 1000}\n")
    (folder / "check.txt").write_text("w1 w2 w3\n")
    (folder / "keys.txt").write_text("# of the tests\n" + "k" * 40 + "\n")
    shutil.copy(run / "chat_template.jinja", folder / "template.jinja")
    _chains(folder / "chains")


def make_models(folder: Path) -> None:
    """Add models of other forms and libraries, which take as long to make as all the rest."""
    _parts(folder / "hf", folder / "parts")
    _sharded(folder / STEP, folder / "sharded")
    _foreign(folder / "foreign")
    _dense(folder / "dense")


def _parts(whole: Path, folder: Path) -> None:
    """A model of transformers with an index of its files, of which there is one."""
    shutil.copytree(whole, folder)
    _in_parts(folder)


def _in_parts(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    names = load_file(folder / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _sharded(step: Path, folder: Path) -> None:
    """A model as processes store it that each write their shards."""
    folder.mkdir()
    shutil.copy(step / "config.json", folder)
    shutil.copytree(step.parents[1] / "tokenizer", folder / "tokenizer")
    tensors = load_file(step / "model.safetensors")
    write_shards(folder, {f"model/{name}": each for name, each in tensors.items()})


def _chains(folder: Path) -> None:
    task = PermHop(4, 2)
    cfg = MythosConfig(
        vocab_size=task.vocab_size, dim=16, n_heads=2, n_kv_heads=1, ffn_dim=16, n_experts=0,
        max_loop_iters=2, max_seq_len=16,
    )  # fmt: skip
    save_pretrained(OpenMythos(cfg), folder)
    save_task(task, folder)


def _parquet(path: Path) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        path.touch()
        return
    pq.write_table(pa.table({"text": ["a text"] * 20}), path)


def _foreign(folder: Path) -> None:
    """A checkpoint of another library in parts, with all that is read of it."""
    from interop.equality import write
    from interop.references import example
    from interop.test_everywhere import tokenizer

    write(example("ouro"), folder)
    _in_parts(folder)
    (folder / "tokenizer.json").write_text(tokenizer())
    named = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|end|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|end|>"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    (folder / "LICENSE").write_text("MIT License\n")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def _dense(folder: Path) -> None:
    """A dense model of transformers with its tokenizer; without transformers an empty folder."""
    try:
        from interop.dense_models import dense_model, words
    except pytest.skip.Exception:
        folder.mkdir()
        for file in FILES:
            if file.path.startswith(f"{folder.name}/"):
                (folder.parent / file.path).write_text("{}")
        return
    dense_model("llama").save_pretrained(folder)
    words().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def copied(good: Path, to: Path) -> Path:
    """Copy the good folder for one case."""
    shutil.copytree(good, to, symlinks=True)
    return to
