"""Run the demo: data, training, evaluation, report."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import torch
from rich.console import Console

from experiments import machine
from experiments.c1_depth.recipe import (
    CHOSEN_LOOPS,
    TASK,
    TRAINED_HOPS,
    accuracy_grid,
    questions,
    recipe,
)
from experiments.demo.figure import draw
from experiments.demo.report import write_report
from experiments.demo.results import DemoResults
from experiments.demo.setup import (
    EVAL_DEPTHS,
    EXIT_RULE,
    HOP_LOOPS,
    PROMPT,
    SAMPLE_DEPTHS,
    SAMPLE_TOKENS,
    TEST_HOPS,
    TRAINED_DEPTH,
    VOCABULARY,
    dense_counterpart,
    text_config,
)
from experiments.demo.terminal import show
from experiments.demo.training import Job, Trained, train_all
from open_mythos.data import EpochWindows, TokenShards, prepare, read_documents
from open_mythos.errors import ConfigError
from open_mythos.evaluation import expert_routing
from open_mythos.model.depth import Depth
from open_mythos.model.exit_rules import exit_rule
from open_mythos.model.generation import generate
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.trace import LoopTrace
from open_mythos.ops.sampling import SamplingParams
from open_mythos.tokenizer import BPETokenizer, Tokenizer
from open_mythos.train import RunConfig

MARKER = ".open-mythos-demo"


def run_demo(folder: Path, *, seed: int, quick: bool, quiet: bool) -> DemoResults:
    """Train and evaluate all models; write models, plot and report to ``folder``."""
    console = Console(quiet=quiet)
    _prepare_folder(folder)
    console.print("[bold]1[/] prepare text: the source of Python's standard library")
    tokenizer = BPETokenizer.train(read_documents("stdlib"), VOCABULARY)
    prepare("stdlib", folder / "data", tokenizer, val_fraction=0.03)
    text = TokenShards(folder / "data").info
    console.print(
        f"  {text.documents} files, {text.text_bytes / 1e6:.1f} MB, {text.tokens:,} tokens"
    )
    console.print(
        "[bold]2[/] train looped and dense models of equal size on the text and on chains of "
        f"{TRAINED_HOPS} relations"
    )
    chains, words = recipe(seed, quick=quick), text_config(folder, seed, quick)
    jobs = [
        Job("looped", chains, folder / "chains" / "looped", is_chains=True),
        Job("looped, mixture of experts", words, folder / "looped", is_chains=False),
        Job("dense", dense_counterpart(words), folder / "dense", is_chains=False),
        Job("dense", dense_counterpart(chains), folder / "chains" / "dense", is_chains=True),
    ]  # the longest first
    looped_chains, looped_text, dense_text, dense_chains = train_all(jobs, quiet)
    console.print("[bold]3[/] evaluate the same weights at different depths")
    results = _measure(words, quick, looped_chains, dense_chains, looped_text, dense_text)
    results.save(folder / "results.json")
    draw(results, folder / "demo.png")
    write_report(results, folder / "demo.png", folder / "report.html")
    show(results, Console())
    print(f"plot:    {folder / 'demo.png'}\nreport:  {folder / 'report.html'}")
    command = f"python -m experiments trace {jobs[0].folder}"
    print(f"try:     {command} 'e3 r1 r4 r2 r7 r0 r5 r3' --n-loops 24")
    return results


def _prepare_folder(folder: Path) -> None:
    """Create an empty marked folder; replace only the folder of an earlier demo."""
    marker = folder / MARKER
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not marker.is_file():
        raise ConfigError(
            "the folder has files that are not from the demo", where="--out", value=str(folder),
            allowed="a new or empty folder, or one of an earlier demo", fix="pass another folder",
        )  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marker.touch()


def _measure(
    config: RunConfig,
    quick: bool,
    looped_chains: Trained,
    dense_chains: Trained,
    looped: Trained,
    dense: Trained,
) -> DemoResults:
    chain_model, text_model = looped_chains.model, looped.model
    assert isinstance(chain_model, OpenMythos)
    assert isinstance(text_model, OpenMythos)
    programs = 200 if quick else 4096  # a tenth of them is held out and evaluated
    chosen = [_with_early_exit(chain_model, hops, programs) for hops in TEST_HOPS]
    exit_loops, exit_accuracy = zip(*chosen, strict=True)
    shards = TokenShards(config.data.path, "val")
    tokenizer = shards.tokenizer()
    batches = list(
        EpochWindows(shards, seq_len=config.train.seq_len, global_batch=16, max_windows=32)
    )
    trace = LoopTrace()
    with torch.no_grad():
        text_model(batches[0].input_ids, n_loops=EVAL_DEPTHS[-1], trace=trace)
    routing = expert_routing(text_model, batches, 2 * TRAINED_DEPTH)[0]
    train_bytes = looped.tokens * TokenShards(config.data.path).bytes_per_token
    return DemoResults(
        hops=list(TEST_HOPS), entities=TASK.entities, hop_loops=list(HOP_LOOPS),
        chosen_loops=CHOSEN_LOOPS, trained_hops=TRAINED_HOPS,
        hop_accuracy=accuracy_grid(chain_model, TEST_HOPS, HOP_LOOPS, programs),
        hop_dense=[
            row[0] for row in accuracy_grid(dense_chains.model, TEST_HOPS, HOP_LOOPS, programs)
        ],
        exit_rule=EXIT_RULE, exit_loops=list(exit_loops), exit_accuracy=list(exit_accuracy),
        hop_looped_run=looped_chains.curve, hop_dense_run=dense_chains.curve,
        looped=looped.curve, dense=dense.curve,
        depths=list(EVAL_DEPTHS), looped_bits=[row["bits_per_byte"] for row in looped.rows],
        dense_bits=dense.rows[0]["bits_per_byte"],
        mean_depth=TRAINED_DEPTH, max_depth=looped.max_depth,
        rho=text_model.recurrent.injection.spectral_radius().item(),
        state_norm=[trace.state_norm[t].mean().item() for t in range(trace.n_loops)],
        state_change=[trace.delta_norm[t].mean().item() for t in range(trace.n_loops)],
        expert_load=routing.load, expert_overlap=routing.overlap,
        samples={depth: _continue(looped, tokenizer, Depth(depth)) for depth in SAMPLE_DEPTHS},
        dense_sample=_continue(dense, tokenizer), prompt=PROMPT,
        train_bytes=round(train_bytes),
        val_bytes=round(looped.rows[0]["tokens"] * shards.bytes_per_token),
        seed=config.train.seed, machine=f"{platform.machine()}, {torch.get_num_threads()} threads",
        versions=machine.versions(),
    )  # fmt: skip


def _with_early_exit(model: OpenMythos, hops: int, programs: int) -> tuple[float, float]:
    """Return mean loops and accuracy on chains of ``hops`` under the exit rule."""
    ids_BT, answers_B = questions(hops, programs)
    trace = LoopTrace()
    rule = exit_rule(EXIT_RULE, model)
    logits = model(ids_BT, n_loops=HOP_LOOPS[-1], exit_rule=rule, trace=trace)
    assert trace.exits is not None
    right = logits[:, -1].argmax(-1) == answers_B
    return trace.exits[:, -1].float().mean().item(), right.float().mean().item()


def _continue(run: Trained, tokenizer: Tokenizer, depth: Depth | None = None) -> str:
    """Return the greedy continuation of the prompt."""
    ids = tokenizer.encode(PROMPT)
    params = SamplingParams(SAMPLE_TOKENS, temperature=0.0, eos_token_id=tokenizer.eos_id)
    out = generate(run.model, torch.tensor([ids]), params, depth)
    return tokenizer.decode(out[0, len(ids) :].tolist())
