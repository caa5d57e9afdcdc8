"""The demo from text to report."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from open_mythos.accounting import account
from open_mythos.cli.data import tokenizer_named
from open_mythos.cli.demo.figure import draw
from open_mythos.cli.demo.hops import HopLoader, accuracy_grid
from open_mythos.cli.demo.report import write_report
from open_mythos.cli.demo.results import Curve, DemoResults
from open_mythos.cli.demo.setup import (
    CHOSEN_LOOPS,
    EVAL_DEPTHS,
    HOP_LOOPS,
    HOPS,
    PROMPT,
    SAMPLE_DEPTHS,
    SAMPLE_TOKENS,
    TASK,
    TEST_HOPS,
    TRAINED_DEPTH,
    VOCABULARY,
    dense_counterpart,
    hops_config,
    text_config,
)
from open_mythos.cli.demo.terminal import show
from open_mythos.cli.training import TrainProgress, build_trainer
from open_mythos.data import EpochWindows, TokenShards, prepare
from open_mythos.errors import ConfigError
from open_mythos.evaluation import expert_routing
from open_mythos.model import OpenMythos
from open_mythos.tokenizer import Tokenizer
from open_mythos.trace import LoopTrace
from open_mythos.train import BatchLoader, RunConfig, Trainer, build_model

MARKER = ".open-mythos-demo"


def run_demo(folder: Path, *, seed: int, quick: bool, quiet: bool) -> DemoResults:
    """Train, measure, print, draw, and write the report into ``folder``."""
    console = Console(quiet=quiet)
    _make_room(folder)
    console.print(
        f"[bold]1[/] Chains of up to {HOPS} relations: a looped and a dense model learn them"
    )
    hops = _Pair(hops_config(seed, quick), quiet, HopLoader)
    console.print("[bold]2[/] Python's own standard library becomes text to learn")
    tokenizer = tokenizer_named(f"bpe:{VOCABULARY}", "stdlib")
    prepare("stdlib", folder / "data", tokenizer, val_fraction=0.03)
    text = TokenShards(folder / "data").info
    console.print(
        f"  {text.documents} files, {text.text_bytes / 1e6:.1f} MB, {text.tokens:,} tokens"
    )
    console.print(
        "[bold]3[/] Two models of as many parameters learn the same text in the same order"
    )
    results = _measure(hops, _Pair(text_config(folder, seed, quick), quiet))
    results.save(folder / "results.json")
    draw(results, folder / "demo.png")
    write_report(results, folder / "demo.png", folder / "report.html")
    show(results, Console())
    print(f"picture: {folder / 'demo.png'}\nreport:  {folder / 'report.html'}")
    return results


def _make_room(folder: Path) -> None:
    """An empty folder that says what it is for; only an earlier demo's is replaced."""
    marker = folder / MARKER
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not marker.is_file():
        raise ConfigError(
            "the folder holds something else, which the demo would replace", where="--out",
            value=str(folder), allowed="a new or empty folder, or one of an earlier demo",
            fix="name another folder",
        )  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marker.touch()


class _Pair:
    """A looped model and its dense counterpart, trained on the same samples."""

    def __init__(
        self, config: RunConfig, quiet: bool, loader: Callable[[int], BatchLoader] | None = None
    ) -> None:
        self.config = config
        self.looped = _Run(config, "  looped", quiet, loader)
        self.dense = _Run(dense_counterpart(config), "  dense ", quiet, loader)


class _Run:
    """One training, and what it logged on the way."""

    def __init__(
        self,
        config: RunConfig,
        label: str,
        quiet: bool,
        loader: Callable[[int], BatchLoader] | None,
    ) -> None:
        self.steps: list[int] = []
        self.loss: list[float] = []
        self.rows: list[dict[str, Any]] = []
        clock = time.perf_counter()
        with TrainProgress(config.train.steps, quiet, label) as progress:
            loggers = [progress, self]
            self.trainer = (
                build_trainer(config, loggers=loggers)
                if loader is None
                else Trainer(
                    build_model(config), loader(config.train.global_batch), config, loggers=loggers
                )
            )
            self.trainer.fit()
        self.seconds = time.perf_counter() - clock
        self.model = self.trainer.model.eval()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Keep the losses and the evaluation."""
        if "loss" in metrics:
            self.steps.append(step)
            self.loss.append(metrics["loss"])
        self.rows = metrics.get("eval/depths", self.rows)

    def curve(self, label: str) -> Curve:
        """The training as data; FLOPs at the mean depth it was trained at."""
        config = self.trainer.config
        counts = account(self.model, context=config.train.seq_len)
        return Curve(
            label, counts.parameters, counts.active_parameters,
            counts.training_flops(config.depth.expected), self.steps, self.loss, self.seconds,
        )  # fmt: skip


def _measure(hops: _Pair, text: _Pair) -> DemoResults:
    config, looped, dense = text.config, text.looped, text.dense
    assert isinstance(looped.model, OpenMythos)
    shards = TokenShards(config.data.path, "val")
    tokenizer = shards.tokenizer()
    batches = list(
        EpochWindows(shards, seq_len=config.train.seq_len, global_batch=16, max_windows=32)
    )
    trace = LoopTrace()
    with torch.no_grad():
        looped.model(batches[0].input_ids, n_loops=EVAL_DEPTHS[-1], trace=trace)
    routing = expert_routing(looped.model, batches, 2 * TRAINED_DEPTH)[0]
    train_bytes = looped.trainer.state.tokens * TokenShards(config.data.path).bytes_per_token
    return DemoResults(
        hops=list(TEST_HOPS),
        entities=TASK.entities,
        hop_loops=list(HOP_LOOPS),
        chosen_loops=CHOSEN_LOOPS,
        trained_hops=HOPS,
        hop_accuracy=accuracy_grid(hops.looped.model),
        hop_dense=[row[0] for row in accuracy_grid(hops.dense.model)],
        hop_looped_run=hops.looped.curve("looped"),
        hop_dense_run=hops.dense.curve("dense"),
        looped=looped.curve("looped, mixture of experts"),
        dense=dense.curve("dense"),
        depths=list(EVAL_DEPTHS),
        looped_bits=[row["bits_per_byte"] for row in looped.rows],
        dense_bits=dense.rows[0]["bits_per_byte"],
        mean_depth=TRAINED_DEPTH,
        max_depth=looped.trainer.state.max_depth,
        rho=looped.model.recurrent.injection.spectral_radius().item(),
        state_norm=[trace.state_norm[t].mean().item() for t in range(trace.n_loops)],
        state_change=[trace.delta_norm[t].mean().item() for t in range(trace.n_loops)],
        expert_load=routing.load,
        expert_overlap=routing.overlap,
        samples={depth: _continue(looped, tokenizer, n_loops=depth) for depth in SAMPLE_DEPTHS},
        dense_sample=_continue(dense, tokenizer),
        prompt=PROMPT,
        train_bytes=round(train_bytes),
        val_bytes=round(looped.rows[0]["tokens"] * shards.bytes_per_token),
        seed=config.train.seed,
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads",
        versions=f"Python {platform.python_version()}, PyTorch {torch.__version__}",
    )


def _continue(run: _Run, tokenizer: Tokenizer, **depth: int) -> str:
    """The text that greedy decoding adds to the prompt."""
    ids = tokenizer.encode(PROMPT)
    out = run.model.generate(
        torch.tensor([ids]), SAMPLE_TOKENS, temperature=0.0, eos_token_id=tokenizer.eos_id, **depth
    )
    return tokenizer.decode(out[0, len(ids) :].tolist())
