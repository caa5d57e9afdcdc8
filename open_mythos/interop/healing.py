"""The folder of a retrofitted model, and the training run that heals it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from open_mythos.config import MythosConfig
from open_mythos.files import write_text
from open_mythos.hub.pretrained import save_pretrained
from open_mythos.interop.retrofit import Split
from open_mythos.model.mythos import OpenMythos
from open_mythos.run_folder import RETROFIT_FILE, TEMPLATE_FILE
from open_mythos.tokenizer import Tokenizer
from open_mythos.train.config import DepthConfig, OptimConfig, RunConfig, TrainConfig

HEAL_FILE = "heal.yaml"
STEPS = 2000
_SECTIONS = ("architecture", "model", "depth", "optim", "train")


def healing_run(cfg: MythosConfig, folder: str, steps: int = STEPS) -> RunConfig:
    """Return the run that heals the model in ``folder``.

    After McLeish et al. (arXiv 2511.07384): the mean depth grows from 1 over the first quarter,
    the last 8 loops carry gradient, Muon updates the matrices of the blocks and AdamW, at a lower
    rate, all else; warm-up, stable, decay over the last 60 %. Their rate of Muon, 1e-3, is that of
    an orthogonal update; ours is on the scale of AdamW's, on which theirs is about 1e-4.
    """
    mean = float(cfg.max_loop_iters)
    return RunConfig(
        model=cfg,
        depth=DepthConfig(plan="poisson", mean=mean, curriculum_steps=max(1, steps // 4)),
        optim=OptimConfig(name="muon", lr=1e-4, adamw_lr=5e-5, weight_decay=1e-4),
        train=TrainConfig(
            steps=steps, seq_len=min(1024, cfg.max_seq_len), global_batch=16, micro_batch=4,
            schedule="wsd", warmup_steps=min(50, steps // 10), decay_steps=max(1, steps * 6 // 10),
            min_lr_ratio=0.0, grad_loops=8, dtype="auto", eval_every=max(1, steps // 8),
            save_every=max(1, steps // 8), eval_depths=[1, 2, 4, 8], init_from=folder,
            out_dir=f"runs/{Path(folder).name}_healed",
        ),
    )  # fmt: skip


def write_folder(
    folder: Path,
    model: OpenMythos,
    tokenizer: Tokenizer | None,
    record: dict[str, Any],
    teacher: str = "",
    chat_template: str = "",
    steps: int = STEPS,
) -> None:
    """Write a retrofitted model with its tokenizer, record and ``heal.yaml``.

    Args:
        folder: Created if missing.
        model: The looped model.
        tokenizer: Of the dense model.
        record: What :func:`record_of` returns.
        teacher: Model that ``heal.yaml`` offers for distillation: the folder of the dense model, or
            of the looped one, which equals it at one loop; "" for none.
        chat_template: Of the dense model; the server uses it.
        steps: Of the healing; ramps and decay are shares of them.
    """
    save_pretrained(model, folder, tokenizer=tokenizer)
    if chat_template:
        write_text(folder / TEMPLATE_FILE, chat_template)
    text = json.dumps(record, indent=2) + "\n"
    write_text(folder / RETROFIT_FILE, text)
    write_text(folder / HEAL_FILE, healing_yaml(model.cfg, str(folder), teacher, steps))


def healing_yaml(cfg: MythosConfig, folder: str, teacher: str, steps: int = STEPS) -> str:
    """Return the text of ``heal.yaml``: the sections that healing sets."""
    values = {k: v for k, v in healing_run(cfg, folder, steps).to_dict().items() if k in _SECTIONS}
    lines = [
        f"# Heals {folder}: open-mythos train --config {folder}/{HEAL_FILE} --source TEXT",
        "# With AdamW alone: --optim.name adamw --optim.adamw_lr 0 --optim.lr 5e-5",
    ]
    if teacher:
        lines += [
            "# Distillation to the dense model, for one more forward pass per step:",
            f"# --train.teacher {teacher}",
        ]
    return "\n".join(lines) + "\n" + yaml.safe_dump(values, sort_keys=False)


def record_of(
    source: str, family: str, digest: str, split: Split, mode: str, decay: float,
    licence: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the provenance of a retrofitted model, JSON-ready."""
    return {
        "source": source, "family": family, "licence": licence, "gguf_sha256": digest,
        "mode": mode, "decay": decay, "dense_layers": split.n_layers, "layers": split.places,
        "dropped": split.dropped,
    }  # fmt: skip
