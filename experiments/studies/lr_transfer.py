"""Does the best learning rate transfer from small models to wide ones or to more loops?

``python -m experiments.studies.lr_transfer`` trains small looped models on the bytes of Python's
standard library over a grid of learning rates. Writes a JSON file, a plot and the tables of
docs/optimizers.md. An interrupted sweep resumes at the first unfinished cell.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks import machine
from experiments.figure import COLOURS, panels
from experiments.listing import markdown_table
from experiments.results import plain
from experiments.studies.common import ROOT, Study, load
from experiments.text import VOCABULARY, standard_library, validation
from open_mythos.config import MythosConfig
from open_mythos.data import Batch, Loader, TokenShards
from open_mythos.evaluation import evaluate_depths
from open_mythos.train import (
    DepthConfig,
    DivergedError,
    OptimConfig,
    RunConfig,
    TrainConfig,
    Trainer,
    build_model,
)
from open_mythos.train.optimizers.ema import WeightAverage

STUDY = Study(
    "lr_transfer",
    ROOT / "docs" / "optimizers" / "lr_transfer.png",
    "The best learning rate by optimizer, width and loops (10 minutes on one core).",
)
LABELS = {"adamw": "AdamW", "muon": "Muon"}


@dataclass(frozen=True)
class Scale:
    """Grid and sizes of the sweep."""

    widths: tuple[int, ...]
    """Widths compared at ``loops[0]``."""
    loops: tuple[int, ...]
    """Mean loops, compared at ``depth_width``."""
    depth_width: int
    rates: dict[str, tuple[float, ...]]
    """Optimizer -> learning rates."""
    steps: int
    batch: int
    seq_len: int
    windows: int
    """Validation sequences."""
    ema_decay: float
    seed: int


def _doubling(first: float, number: int) -> tuple[float, ...]:
    return tuple(first * 2**i for i in range(number))


FULL = Scale(
    (32, 64, 128), (2, 8), 64, {"adamw": _doubling(0.001, 6), "muon": _doubling(0.002, 6)},
    steps=170, batch=8, seq_len=64, windows=64, ema_decay=0.98, seed=0,
)  # fmt: skip
QUICK = Scale(
    (16, 32), (1, 2), 32, {"adamw": (0.004, 0.008), "muon": (0.004, 0.008)},
    steps=4, batch=2, seq_len=16, windows=2, ema_decay=0.9, seed=0,
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One training run."""

    optimizer: str
    width: int
    loops: int
    lr: float

    @property
    def name(self) -> str:
        """Return the unique name of the cell."""
        return f"{self.optimizer}-{self.width}-{self.loops}-{self.lr:g}"


@dataclass(frozen=True)
class Best:
    """The best learning rate for one optimizer, width and number of loops."""

    optimizer: str
    width: int
    loops: int
    lr: float
    """Minimum of the parabola, in log(lr), through the best grid point and its neighbors."""
    loss: float
    """Loss at the best grid point."""
    at_edge: bool
    """Whether the best grid point is the first or last one, so the optimum may be outside."""


def cells(scale: Scale) -> list[Cell]:
    """Return all cells of a scale, small models first."""
    shapes = [(width, scale.loops[0]) for width in scale.widths]
    shapes += [(scale.depth_width, loops) for loops in scale.loops[1:]]
    return [
        Cell(optimizer, width, loops, lr)
        for width, loops in shapes
        for optimizer, rates in scale.rates.items()
        for lr in rates
    ]


def run_config(cell: Cell, scale: Scale) -> RunConfig:
    """Configure a run with every kind of weight matrix: heads of 16, four experts."""
    width = cell.width
    model = MythosConfig(
        vocab_size=VOCABULARY, dim=width, n_heads=width // 16, n_kv_heads=max(1, width // 32),
        max_seq_len=scale.seq_len, max_loop_iters=4, prelude_layers=1, coda_layers=1,
        attn_type="gqa", n_experts=4, n_shared_experts=1, n_experts_per_tok=2, expert_dim=width,
        ffn_dim=3 * width, lora_rank=0, max_output_tokens=scale.seq_len,
    )  # fmt: skip
    return RunConfig(
        model=model,
        depth=DepthConfig(plan="poisson", mean=float(cell.loops)),
        optim=OptimConfig(name=cell.optimizer, lr=cell.lr),
        train=TrainConfig(
            seed=scale.seed, steps=scale.steps, seq_len=scale.seq_len, global_batch=scale.batch,
            warmup_steps=scale.steps // 10, device="cpu",
        ),
    )  # fmt: skip


def measure(cell: Cell, scale: Scale, text: Path) -> dict[str, Any]:
    """Measure validation losses at the mean depth, halfway and at the end; None if not finite.

    Losses named "averaged" use the :class:`WeightAverage` of the weights.
    """
    run, start = run_config(cell, scale), time.process_time()
    loader = Loader(
        TokenShards(text), seq_len=scale.seq_len, global_batch=scale.batch, seed=scale.seed
    )
    trainer = Trainer(build_model(run), loader, run)
    average = WeightAverage(trainer.model, scale.ema_decay)
    batches = validation(text, seq_len=scale.seq_len, windows=scale.windows)
    found: dict[str, Any] = asdict(cell)
    at = {"halfway": scale.steps // 2, "end": scale.steps}
    try:
        for when, steps in at.items():
            while trainer.state.step < steps:
                if not trainer.train_step(trainer.state.step).skipped:
                    average.update()
            found[when] = _loss(trainer, batches, cell.loops)
            with average.swap():
                found[f"{when}_averaged"] = _loss(trainer, batches, cell.loops)
    except DivergedError:
        found |= {when: None for name in at for when in (name, f"{name}_averaged")}
    return found | {"cpu_seconds": round(time.process_time() - start, 2)}


def _loss(trainer: Trainer, batches: Sequence[Batch], loops: int) -> float | None:
    loss = evaluate_depths(trainer.model, batches, [loops])[0].loss
    return round(loss, 5) if math.isfinite(loss) else None


def sweep(scale: Scale, path: Path, work: Path) -> Iterator[dict[str, Any]]:
    """Measure the cells missing in ``path``, and write it after each one.

    Raises:
        SystemExit: ``path`` holds results of another scale.
    """
    content: dict[str, Any] = {
        "machine": machine.describe(),
        "scale": plain(asdict(scale)),
        "cells": {},
    }
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["scale"] != plain(asdict(scale)):
            raise SystemExit(
                f"{path} holds results of another scale: delete it or pass another --out"
            )
    pending = [cell for cell in cells(scale) if cell.name not in content["cells"]]
    text = standard_library(work) if pending else work
    for cell in pending:
        content["cells"][cell.name] = measure(cell, scale, text)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".unfinished")
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
        yield content["cells"][cell.name]


def bests(found: dict[str, Any], when: str = "end") -> list[Best]:
    """Return the best learning rate for every optimizer, width and number of loops."""
    curves: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
    for cell in found["cells"].values():
        loss = math.inf if cell[when] is None else cell[when]
        key = cell["optimizer"], cell["width"], cell["loops"]
        curves.setdefault(key, []).append((cell["lr"], loss))
    return [Best(*key, *_lowest(sorted(curve))) for key, curve in curves.items()]


def _lowest(curve: Sequence[tuple[float, float]]) -> tuple[float, float, bool]:
    """Return the learning rate at the parabola's minimum, and the best loss and its place."""
    i = min(range(len(curve)), key=lambda j: curve[j][1])
    lr, loss = curve[i]
    if i in (0, len(curve) - 1):
        return lr, loss, True
    below, above = curve[i - 1][1] - loss, curve[i + 1][1] - loss
    if not math.isfinite(below + above) or below + above <= 0:
        return lr, loss, False
    step = math.log(curve[i + 1][0] / lr)
    return lr * math.exp(step * (below - above) / (2 * (below + above))), loss, False


def exponent(points: Sequence[Best]) -> float:
    """Fit a in lr ~ width^a by least squares of the logarithms."""
    x, y = (np.log([getattr(best, name) for best in points]) for name in ("width", "lr"))
    return float(np.polyfit(x, y, 1)[0])


def loss_at(found: dict[str, Any], best: Best, lr: float) -> float | None:
    """Return the loss at the grid point nearest to ``lr``; None if it diverged."""
    nearest = min(_like(found, best), key=lambda cell: abs(math.log(cell["lr"] / lr)))
    loss: float | None = nearest["end"]
    return loss


def _like(found: dict[str, Any], best: Best) -> list[dict[str, Any]]:
    """Return the cells of the same shape as ``best``, sorted by learning rate."""
    key = best.optimizer, best.width, best.loops
    same = [
        cell
        for cell in found["cells"].values()
        if (cell["optimizer"], cell["width"], cell["loops"]) == key
    ]
    return sorted(same, key=lambda cell: cell["lr"])


def markdown(found: dict[str, Any]) -> str:
    """Format the table of docs/optimizers.md.

    The last column is the cost of transfer: the loss at the grid point nearest to the best rate of
    the optimizer's smallest model, minus the best loss.
    """
    rows = []
    for optimizer, found_rows in _by_optimizer(bests(found)).items():
        for best in found_rows:
            carried = loss_at(found, best, found_rows[0].lr)
            rows.append((
                LABELS[optimizer], str(best.width), str(best.loops),
                f"{best.lr:.4f}" + (" (edge of the grid)" if best.at_edge else ""),
                f"{best.loss:.3f}",
                "diverged" if carried is None else f"{carried - best.loss:+.3f}",
            ))  # fmt: skip
    head = ("optimizer", "width", "mean loops", "best learning rate", "loss there",
            "with that of the smallest model")  # fmt: skip
    return markdown_table(head, rows).rstrip()


def verdict(found: dict[str, Any]) -> str:
    """Summarize the table: one line per optimizer and one that compares them."""
    groups, lines = _by_optimizer(bests(found)), []
    for optimizer, rows in groups.items():
        wide = [best for best in rows if best.loops == rows[0].loops]
        deep = [best for best in rows if best.width == rows[-1].width]
        lines.append(
            f"- **{LABELS[optimizer]}:** from width {wide[0].width} to {wide[-1].width} the best "
            f"learning rate {_moves(wide)}, as width^{exponent(wide):.2f}; from {deep[0].loops} to "
            f"{deep[-1].loops} loops it {_moves(deep)}."
        )
    pairs = list(zip(groups["adamw"], groups["muon"], strict=True))
    rates = sorted(muon.lr / adamw.lr for adamw, muon in pairs)
    gains = sorted(adamw.loss - muon.loss for adamw, muon in pairs)
    seconds = {
        name: sum(c["cpu_seconds"] for c in found["cells"].values() if c["optimizer"] == name)
        for name in groups
    }
    lines.append(
        f"- **Side by side:** at equal size the best learning rate of Muon is {rates[0]:.1f} to "
        f"{rates[-1]:.1f} times that of AdamW, its loss there {gains[0]:.2f} to {gains[-1]:.2f} "
        f"nats lower, its CPU time {seconds['muon'] / seconds['adamw']:.2f} times as much."
    )
    return "\n".join(lines)


def _moves(rows: Sequence[Best]) -> str:
    ratio = rows[-1].lr / rows[0].lr
    verb = "falls" if ratio < 1 else "rises"
    return f"{verb} by a factor of {max(ratio, 1 / ratio):.1f}"


def averaging(found: dict[str, Any]) -> str:
    """Format what weight averaging gains, halfway and at the end."""
    rows = []
    for when in ("halfway", "end"):
        gains: list[list[float]] = [[], []]
        for best in bests(found, when):
            same = [cell for cell in _like(found, best) if cell[when] is not None]
            picked = min(same, key=lambda cell: cell[when]), same[-1]
            for side, cell in zip(gains, picked, strict=True):
                side.append(cell[f"{when}_averaged"] - cell[when])
        rows.append((when, *(f"{mean(side):+.3f}" for side in gains)))
    head = ("", "at the best learning rate", "at the highest that did not diverge")
    return markdown_table(head, rows).rstrip()


def _by_optimizer(rows: Sequence[Best]) -> dict[str, list[Best]]:
    """Group by optimizer, sorted by loops, then width."""
    found: dict[str, list[Best]] = {}
    for best in sorted(rows, key=lambda best: (best.loops, best.width)):
        found.setdefault(best.optimizer, []).append(best)
    return found


def plot(found: dict[str, Any], path: Path) -> None:
    """Plot loss against learning rate per optimizer and size; vertical lines mark the best."""
    groups = _by_optimizer(bests(found))
    with panels(path, len(groups)) as axes:
        for ax, (optimizer, rows) in zip(axes, groups.items(), strict=True):
            for best, colour in zip(rows, COLOURS, strict=False):
                points = [cell for cell in _like(found, best) if cell["end"] is not None]
                ax.plot(
                    [cell["lr"] for cell in points], [cell["end"] for cell in points],
                    "-" if best.loops == rows[0].loops else "--", marker=".", color=colour,
                    label=f"width {best.width}, {best.loops} loops",
                )  # fmt: skip
                ax.axvline(best.lr, color=colour, alpha=0.35, linewidth=1)
            rates = [cell["lr"] for cell in _like(found, rows[0])]
            ax.set(
                xscale="log", title=LABELS[optimizer], xlabel="learning rate",
                ylabel="validation loss, nats per byte",
            )  # fmt: skip
            ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
            ax.minorticks_off()
        axes[0].legend(loc="upper center")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the sweep; save and print the results."""
    options = STUDY.parse(arguments)
    scale = QUICK if options.quick else FULL
    torch.set_num_threads(1)
    console, total = Console(), len(cells(scale))
    for i, cell in enumerate(sweep(scale, options.out, options.work), start=1):
        console.print(
            f"[dim]{i} of at most {total}: {cell['optimizer']}, width {cell['width']}, "
            f"{cell['loops']} loops, lr {cell['lr']:g}: {cell['end']}[/dim]"
        )
    found = load(options.out)
    plot(found, options.picture)
    for text in (markdown(found), verdict(found), averaging(found)):
        console.print(text, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
