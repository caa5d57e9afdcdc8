"""``open-mythos generate`` and ``open-mythos evaluate``: what a trained model says and scores."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from open_mythos.cli.run_data import Source, evaluation_batches
from open_mythos.data import Batch
from open_mythos.devices import resolve_device, resolve_dtype
from open_mythos.errors import ConfigError
from open_mythos.evaluation import DepthRow, ExitReport, ExitRow, evaluate_depths, evaluate_exits
from open_mythos.hub.pretrained import from_pretrained, stored_tokenizer
from open_mythos.inference.quantization import quantize as quantize_model
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.depth import Depth
from open_mythos.model.exit_rules import exit_rule
from open_mythos.model.generation import GrowingDecoder, generate
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.trace import LoopTrace
from open_mythos.ops.sampling import SamplingParams
from open_mythos.tokenizer import StreamDecoder, load_tokenizer

_BAR = 30
"""Width of the histogram's longest bar."""


def generate_text(
    checkpoint: str,
    prompt: str,
    n_loops: int | None,
    sampling: dict[str, Any],
    *,
    exit: str,
    quantize: str,
    tokenizer: str,
    device: str,
    quiet: bool,
) -> int:
    """Print the continuation as it is made, and at the end how deep it went if a rule decided."""
    model = _loaded(checkpoint, device, quantize)
    tok = load_tokenizer(tokenizer) if tokenizer else stored_tokenizer(checkpoint)
    ids = tok.encode(prompt) or [tok.bos_id]
    depth = _depth(model, n_loops, exit)
    trace = LoopTrace() if exit else None
    stream, loops, tokens = StreamDecoder(tok), 0, 0

    def show(_: int, token_B: torch.Tensor) -> None:
        nonlocal loops, tokens
        if trace is not None and trace.exits is not None:
            # of the tokens that this one was computed from
            loops, tokens = loops + int(trace.exits.sum()), tokens + trace.exits.numel()
        if not quiet and int(token_B) != tok.eos_id:
            print(stream.push(int(token_B)), end="", flush=True)

    if not quiet:
        print(prompt, end="", flush=True)
    prompt_ids = torch.tensor([ids], device=model.head.weight.device)
    # a vocabulary smaller than the tokenizer's, without its special tokens, cannot predict eos
    eos_id = tok.eos_id if tok.eos_id < model.cfg.vocab_size else None
    params = SamplingParams(**sampling, eos_token_id=eos_id)
    out = generate(
        model, prompt_ids, params, depth, tokenizer=tok, on_token=show,
        decoder=partial(GrowingDecoder, trace=trace),
    )  # fmt: skip
    print(tok.decode(out[0, len(ids) :].tolist()) if quiet else stream.flush())
    if tokens and not quiet:
        most = depth.n_loops or model.cfg.max_loop_iters
        print(f"{loops / tokens:.2f} of {most} loops per token, {tokens} tokens", file=sys.stderr)
    return 0


def evaluate_checkpoint(
    checkpoint: str,
    data: str,
    depths: list[int] | None,
    *,
    exit: str,
    n_loops: int | None,
    repeats: int,
    split: str,
    seq_len: int,
    windows: int,
    batch: int,
    dtype: str,
    quantize: str,
    device: str,
    out: str,
    quiet: bool,
) -> int:
    """Print loss and bits per byte against depth, or under an exit rule."""
    _refuse_what_would_be_ignored(depths, exit, n_loops, repeats)
    model = _loaded(checkpoint, device, quantize)
    source = evaluation_batches(
        checkpoint, data, split, seq_len=seq_len, windows=windows, batch=batch
    )
    options: dict[str, Any] = {
        "bytes_per_token": source.bytes_per_token, "dtype": resolve_dtype(dtype)
    }  # fmt: skip
    content: dict[str, Any] = {"checkpoint": checkpoint, "split": source.name}
    content |= {"quantize": quantize} if quantize else {}
    if exit:
        rule = exit_rule(exit, model)
        shown = _progress(source, quiet)
        report = evaluate_exits(model, shown, rule, n_loops, repeats=repeats, **options)
        for table in _exit_tables(report, f"{checkpoint}, {source.name}", exit):
            Console().print(table)
        content |= {"exit": exit, "report": asdict(report)}
    else:
        if depths is None:
            trained = model.cfg.max_loop_iters
            depths = [2**k for k in range((4 * trained).bit_length())]
        rows = evaluate_depths(model, _progress(source, quiet), depths, **options)
        Console().print(_table(rows, checkpoint, source.name))
        content["depths"] = [asdict(row) for row in rows]
    if out:
        Path(out).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def _loaded(checkpoint: str, device: str, quantised: str) -> CausalLM:
    """The model, quantised if ``quantised`` says how: "int8", "int4" or "int4:GROUP"."""
    model = from_pretrained(checkpoint, resolve_device(device))
    if not quantised:
        return model
    kind, colon, group = quantised.partition(":")
    if colon and not group.isdecimal():
        raise ConfigError(
            "not a group size", where="--quantize", value=quantised,
            allowed="int8, int4, or int4 with the size of its groups: int4:64",
        )  # fmt: skip
    return quantize_model(model, kind, group_size=int(group) if colon else None)


def _depth(model: CausalLM, n_loops: int | None, exit: str) -> Depth:
    """Return the loops of every token, as the options say."""
    if isinstance(model, OpenMythos):
        return Depth(n_loops, exit_rule(exit, model) if exit else None)
    for option, value in (("--n-loops", n_loops), ("--exit", exit or None)):
        if value is not None:
            raise ConfigError("a dense model has no loops", where=option, value=value)
    return Depth()


def _refuse_what_would_be_ignored(
    depths: list[int] | None, exit: str, n_loops: int | None, repeats: int
) -> None:
    if exit and depths is not None:
        raise ConfigError(
            "an exit rule chooses the depths", where="--depths", value=depths,
            allowed="--n_loops: the most loops", fix="leave out --depths or --exit",
        )  # fmt: skip
    for option, value in (("--n_loops", n_loops), ("--repeats", repeats or None)):
        if not exit and value is not None:
            raise ConfigError(
                "only an exit rule reads this", where=option, value=value,
                allowed="together with --exit", fix="name fixed depths with --depths",
            )  # fmt: skip


def _progress(source: Source, quiet: bool) -> Iterable[Batch]:
    return track(
        source.batches, "evaluating", console=Console(stderr=True), disable=quiet, transient=True
    )


def _exit_tables(report: ExitReport, title: str, rule: str) -> tuple[Table, Table]:
    """Adaptive depth beside the others, and where the positions left."""
    columns: dict[str, Callable[[ExitRow], str]] = {
        "loops": lambda row: f"{row.mean_loops:.2f}",
        "computed": lambda row: f"{row.computed:.1%}",
        "loss": lambda row: f"{row.loss:.4f}",
        "accuracy": lambda row: f"{row.accuracy:.2%}",
    }
    if report.full.bits_per_byte is not None:
        columns["bits/byte"] = lambda row: f"{row.bits_per_byte:.4f}"
    if report.full.seconds is not None:
        columns["seconds"] = lambda row: f"{row.seconds:.3f}"
    depths = Table(title=f"{title}: {report.tokens:,} tokens", title_justify="left")
    depths.add_column("depth", no_wrap=True)
    for heading in columns:
        depths.add_column(heading, justify="right")
    for row in report.rows:
        name = rule if row is report.adaptive else row.name
        depths.add_row(name, *(shown(row) for shown in columns.values()))
    left = Table(title=f"loops run under {rule}", title_justify="left")
    for heading in ("loops", "positions", "share"):
        left.add_column(heading, justify="right")
    left.add_column("")
    most, total = max(report.histogram), sum(report.histogram)
    for loops, count in enumerate(report.histogram, start=1):
        bar = "█" * round(_BAR * count / most)
        left.add_row(str(loops), f"{count:,}", f"{count / total:.1%}", bar)
    return depths, left


def _table(rows: list[DepthRow], checkpoint: str, split: str) -> Table:
    table = Table(title=f"{checkpoint}, {split}: {rows[0].tokens:,} tokens", title_justify="left")
    for heading in ("loops", "loss (nats/token)", "bits per byte", "perplexity"):
        table.add_column(heading, justify="right")
    for row in rows:
        bits = "" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}"
        depth = "-" if row.depth is None else str(row.depth)
        table.add_row(depth, f"{row.loss:.4f}", bits, f"{row.perplexity:.3f}")
    return table
