"""``open-mythos train gate``: teach a trained model when to stop."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from open_mythos.cli.run_data import beside, training_batches
from open_mythos.devices import resolve_device, resolve_dtype
from open_mythos.errors import ConfigError
from open_mythos.hub.pretrained import from_pretrained, save_pretrained
from open_mythos.model.mythos import OpenMythos
from open_mythos.run_folder import CONFIG_FILE, GATE_FILE, TOKENIZER_FOLDER
from open_mythos.train.gate import GateConfig, GateReport, train_gate

DEFAULT_OUT = "runs/gate"
_KEPT = (TOKENIZER_FOLDER, CONFIG_FILE)
"""What the other commands look for beside a model."""


def train_gate_of(
    checkpoint: str,
    config: GateConfig,
    *,
    data: str,
    out: str,
    seq_len: int,
    batch: int,
    dtype: str,
    device: str,
    quiet: bool,
) -> int:
    """Train the gate of a stored model and write the model with it to another folder."""
    config.validate()
    target = Path(out or DEFAULT_OUT)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(
            "the folder is not empty", where="--out", value=str(target),
            allowed="a folder that is new or empty", fix="name another one",
        )  # fmt: skip
    model = from_pretrained(checkpoint, resolve_device(device))
    if not isinstance(model, OpenMythos):
        raise ConfigError(
            "a dense model has no halting gate", where="train gate", value=checkpoint,
            allowed="a looped model",
        )  # fmt: skip
    source = training_batches(checkpoint, data, seq_len=seq_len, batch=batch, seed=config.seed)
    with Console(stderr=True, quiet=quiet).status(f"following {source.name} through the loops"):
        report = train_gate(model, source.batches, config, dtype=resolve_dtype(dtype))
    save_pretrained(model, target)
    _keep_what_others_look_for(checkpoint, target)
    content = {"checkpoint": checkpoint, "config": asdict(config), "report": asdict(report)}
    (target / GATE_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if not quiet:
        Console().print(_table(report, source.name))
    print(f"model with the trained gate: {target}")
    return 0


def _keep_what_others_look_for(checkpoint: str, target: Path) -> None:
    for name in _KEPT:
        found = beside(checkpoint, name)
        if found is not None and found.is_dir():
            shutil.copytree(found, target / name)
        elif found is not None:
            shutil.copy(found, target / name)


def _table(report: GateReport, name: str) -> Table:
    losses = report.loss_by_loop
    table = Table(
        title=f"gate on {name}: {report.positions:,} positions, target {report.target!r}",
        caption=f"everybody after one loop {losses[0]:.4f}, after {len(losses)} {losses[-1]:.4f}\n"
        f"gate's cross-entropy {report.curve[0]:.4f} -> {report.curve[-1]:.4f} nats, "
        f"calibration error {report.calibration_error:.3f}",
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("threshold", "mean loops", "loss (nats/token)", "nothing left to gain"):
        table.add_column(heading, justify="right")
    for row in report.thresholds:
        table.add_row(
            f"{row.threshold:g}", f"{row.mean_loops:.2f}", f"{row.loss:.4f}", f"{row.finished:.1%}"
        )
    return table
