"""``open-mythos generate`` and ``open-mythos evaluate``: what a trained model says and scores."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from open_mythos.cli.training import CONFIG_FILE
from open_mythos.data import EpochWindows, TokenShards
from open_mythos.data.shards import TOKENIZER_FOLDER
from open_mythos.errors import ConfigError, DataError
from open_mythos.evaluation import DepthRow, evaluate_depths
from open_mythos.hub import from_pretrained, model_directory
from open_mythos.model import OpenMythos
from open_mythos.runtime import resolve_device, resolve_dtype
from open_mythos.tokenizer import StreamDecoder, Tokenizer, load_tokenizer


def generate_text(
    checkpoint: str,
    prompt: str,
    n_loops: int | None,
    sampling: dict[str, Any],
    *,
    tokenizer: str,
    device: str,
    quiet: bool,
) -> int:
    """Print the continuation as it is made."""
    model = from_pretrained(checkpoint, resolve_device(device))
    tok = load_tokenizer(tokenizer) if tokenizer else stored_tokenizer(checkpoint)
    ids = tok.encode(prompt) or [tok.bos_id]
    stream = StreamDecoder(tok)

    def show(_: int, token_B: torch.Tensor) -> None:
        if not quiet and int(token_B) != tok.eos_id:
            print(stream.push(int(token_B)), end="", flush=True)

    if not quiet:
        print(prompt, end="", flush=True)
    depth: dict[str, Any] = {}
    if isinstance(model, OpenMythos):
        depth["n_loops"] = model.cfg.max_loop_iters if n_loops is None else n_loops
    elif n_loops is not None:
        raise ConfigError("a dense model has no loops", where="--n-loops", value=n_loops)
    prompt_ids = torch.tensor([ids], device=model.head.weight.device)
    out = model.generate(
        prompt_ids, eos_token_id=tok.eos_id, tokenizer=tok, on_token=show, **sampling, **depth
    )
    print(tok.decode(out[0, len(ids) :].tolist()) if quiet else stream.flush())
    return 0


def evaluate_checkpoint(
    checkpoint: str,
    data: str,
    depths: list[int] | None,
    *,
    split: str,
    seq_len: int,
    windows: int,
    batch: int,
    dtype: str,
    device: str,
    out: str,
    quiet: bool,
) -> int:
    """Print loss and bits per byte against depth."""
    model = from_pretrained(checkpoint, resolve_device(device))
    shards = TokenShards(data or _data_of_the_run(checkpoint), split)
    batches = EpochWindows(shards, seq_len=seq_len, global_batch=batch, max_windows=windows)
    if depths is None:
        trained = model.cfg.max_loop_iters
        depths = [2**k for k in range((4 * trained).bit_length())]
    shown = track(
        batches, "evaluating", console=Console(stderr=True), disable=quiet, transient=True
    )
    rows = evaluate_depths(
        model, shown, depths, bytes_per_token=shards.bytes_per_token, dtype=resolve_dtype(dtype)
    )
    Console().print(_table(rows, checkpoint, split))
    if out:
        content = {"checkpoint": checkpoint, "split": split, "depths": [asdict(r) for r in rows]}
        Path(out).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def stored_tokenizer(checkpoint: str) -> Tokenizer:
    """The tokenizer kept with a model, or with the run that its checkpoint belongs to.

    Raises:
        DataError: There is none.
    """
    return load_tokenizer(_beside(checkpoint, TOKENIZER_FOLDER, "name one with --tokenizer"))


def _data_of_the_run(checkpoint: str) -> str:
    run = _beside(checkpoint, CONFIG_FILE, "name prepared shards with --data")
    return str(yaml.safe_load(run.read_text(encoding="utf-8"))["data"]["path"])


def _beside(checkpoint: str, name: str, fix: str) -> Path:
    """``name`` in the model's folder, or in the run's folder two levels up."""
    folder = model_directory(checkpoint).resolve()
    for parent in (folder, folder.parent, folder.parent.parent):
        if (parent / name).exists():
            return parent / name
    raise DataError(f"no {name} is stored with the model", where=checkpoint, value=name, fix=fix)


def _table(rows: list[DepthRow], checkpoint: str, split: str) -> Table:
    table = Table(title=f"{checkpoint}, {split}: {rows[0].tokens:,} tokens", title_justify="left")
    for heading in ("loops", "loss (nats/token)", "bits per byte", "perplexity"):
        table.add_column(heading, justify="right")
    for row in rows:
        bits = "" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}"
        depth = "-" if row.depth is None else str(row.depth)
        table.add_row(depth, f"{row.loss:.4f}", bits, f"{row.perplexity:.3f}")
    return table
