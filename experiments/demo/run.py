"""Run the demo: data, training, evaluation, report."""

from __future__ import annotations

import platform
import shutil
import time
from pathlib import Path

import torch
from rich.console import Console

from experiments import machine
from experiments.c1_depth import chain_recipe as chains
from experiments.c11_reasoning import sudoku_recipe as sudoku
from experiments.demo.figure import draw
from experiments.demo.measure import measure_chains, measure_sudoku, measure_text
from experiments.demo.report import write_report
from experiments.demo.results import DemoResults
from experiments.demo.setup import (
    DENSE_TEXT_RATE,
    SUDOKU_STEPS,
    TRAINED_DEPTH,
    VOCABULARY,
    dense_counterpart,
    text_config,
)
from experiments.demo.terminal import show
from experiments.demo.training import Job, train_all
from open_mythos.data import TokenShards, prepare, read_documents
from open_mythos.errors import ConfigError
from open_mythos.tokenizer import BPETokenizer

MARKER = ".open-mythos-demo"


def run_demo(folder: Path, *, seed: int, quick: bool, quiet: bool) -> DemoResults:
    """Train and evaluate all models; write models, plot and report to ``folder``."""
    console, clock = Console(quiet=quiet), time.perf_counter()
    _prepare_folder(folder)
    console.print("[bold]1[/] prepare text: the source of Python's standard library")
    tokenizer = BPETokenizer.train(read_documents("stdlib"), VOCABULARY)
    prepare("stdlib", folder / "data", tokenizer, val_fraction=0.03)
    text = TokenShards(folder / "data").info
    console.print(
        f"  {text.documents} files, {text.text_bytes / 1e6:.1f} MB, {text.tokens:,} tokens"
    )
    console.print("[bold]2[/] train looped and dense models on chains, Sudokus and the text")
    on_chains, on_text = chains.recipe(seed, quick=quick), text_config(folder, seed, quick)
    on_sudoku = sudoku.recipe(seed, quick=quick, steps=SUDOKU_STEPS)
    dense_text = dense_counterpart(on_text, lr=DENSE_TEXT_RATE)
    equal_flops = dense_counterpart(
        on_text, "dense-equal-flops", blocks=TRAINED_DEPTH, lr=DENSE_TEXT_RATE
    )
    jobs = [
        Job("chains", "looped", on_chains, folder / "chains" / "looped"),
        Job("text", "looped", on_text, folder / "looped"),
        Job("text", "dense, equal FLOPs", equal_flops, folder / "dense-equal-flops"),
        Job("sudoku", "looped", on_sudoku, folder / "sudoku" / "looped"),
        Job("text", "dense", dense_text, folder / "dense"),
        Job("chains", "dense", dense_counterpart(on_chains), folder / "chains" / "dense"),
        Job("sudoku", "dense", dense_counterpart(on_sudoku), folder / "sudoku" / "dense"),
    ]  # the longest first
    done = dict(zip([(job.task, job.label) for job in jobs], train_all(jobs, quiet), strict=True))
    console.print("[bold]3[/] evaluate the same weights at different depths")
    results = DemoResults(
        chains=measure_chains(done["chains", "looped"], done["chains", "dense"], quick),
        sudoku=measure_sudoku(done["sudoku", "looped"], done["sudoku", "dense"], quick),
        text=measure_text(
            on_text, done["text", "looped"], done["text", "dense"],
            done["text", "dense, equal FLOPs"],
        ),
        seed=seed, machine=f"{platform.machine()}, {torch.get_num_threads()} threads",
        versions=machine.versions(), seconds=round(time.perf_counter() - clock, 1),
    )  # fmt: skip
    results.save(folder / "results.json")
    draw(results, folder / "demo.png")
    write_report(results, folder / "demo.png", folder / "report.html")
    show(results, Console())
    print(f"plot:    {folder / 'demo.png'}\nreport:  {folder / 'report.html'}")
    command = f"python -m experiments trace {folder / 'chains' / 'looped'}"
    print(f"try:     {command} 'e3 r1 r4 r2 r7 r0 r5 r3' --n-loops 24")
    puzzle = "".join(str(digit) if digit else "." for digit in results.sudoku.clues)
    print(f"         python -m experiments trace {folder / 'sudoku' / 'looped'} '{puzzle}'")
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
