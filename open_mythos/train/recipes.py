"""Predefined configurations for ``open-mythos train --recipe NAME``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from open_mythos.config import MythosConfig
from open_mythos.train.config import (
    DataConfig,
    DepthConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from open_mythos.variants import variant

_GPT2 = "openai-community/gpt2"


@dataclass(frozen=True)
class Recipe:
    """A configuration with the defaults of its command-line options."""

    config: RunConfig
    tokens: int = 0
    """Length of the run in tokens, which sets ``train.steps``; 0 keeps the configured steps."""
    subsets: Mapping[str, str] = field(default_factory=dict)
    """Subset -> source, for ``--subset``; the first is the default."""
    needs_text: bool = False
    """Whether ``--source`` or ``--data.path`` is required."""
    needs_checkpoint: bool = False
    """Whether ``--checkpoint`` is required."""


def default_recipe(name: str = "tiny") -> Recipe:
    """Return the defaults of a variant without a recipe: what pays on text (docs/claims.md)."""
    run = RunConfig(
        model=variant(name), optim=OptimConfig(name="muon", lr=2e-2),
        train=TrainConfig(out_dir="runs/train"),
    )  # fmt: skip
    run.depth = mostly_at(run.model.max_loop_iters)
    return Recipe(run)


def mostly_at(n_loops: int) -> DepthConfig:
    """Return the depths with which loops pay on text: ``n_loops``, and others for a quarter."""
    return DepthConfig(plan="mixed", mean=float(n_loops))


def _debug_cpu() -> Recipe:
    """Train for a minute on a laptop, with streaming, evaluation and checkpoints, offline."""
    run = RunConfig(
        model=variant("nano"),
        data=DataConfig(source="stdlib", tokenizer="byte", workers=1, eval_windows=16),
        depth=mostly_at(4),
        optim=OptimConfig(name="muon", lr=2e-2),
        train=TrainConfig(
            steps=200, seq_len=128, global_batch=8, warmup_steps=10, device="cpu",
            eval_every=100, save_every=100, out_dir="runs/debug_cpu",
        ),
    )  # fmt: skip
    return Recipe(run)


def _140m() -> Recipe:
    """Train 140 M parameters on 2.8 B tokens of FineWeb-Edu on one GPU."""
    run = _small_run("140m_fine_web_edu")
    run.data.tokenizer = _GPT2
    return Recipe(run, tokens=2_800_000_000, subsets=_subsets("sample-10BT", "sample-100BT"))


def _370m() -> Recipe:
    """Train 370 M parameters (64 experts, top-4) on 7.4 B tokens of FineWeb-Edu on one node."""
    model = MythosConfig(
        dim=1024, n_heads=16, max_seq_len=2048, max_output_tokens=2048, max_loop_iters=8,
        prelude_layers=3, coda_layers=3, kv_lora_rank=256, q_lora_rank=512, qk_rope_head_dim=32,
        qk_nope_head_dim=64, v_head_dim=64, n_experts=64, n_shared_experts=1, n_experts_per_tok=4,
        expert_dim=1024, lora_rank=8,
    )  # fmt: skip
    run = _reference_run(
        "370m_fine_web_edu", model, lr=4e-4, warmup_steps=1000, global_batch=256, micro_batch=8
    )
    run.data.tokenizer = _GPT2
    return Recipe(run, tokens=7_400_000_000, subsets=_subsets("sample-10BT", "sample-100BT"))


def _3b() -> Recipe:
    """Train the 3B variant on 30 B tokens of FineWeb-Edu."""
    run = _reference_run(
        "3b_fine_web_edu", variant("3b"), lr=3e-4, warmup_steps=2000, global_batch=256,
        micro_batch=4, save_every=500,
    )  # fmt: skip
    run.data = DataConfig(tokenizer="openai/gpt-oss-20b", eval_windows=128)
    run.parallel = ParallelConfig(kind="fsdp")
    subsets = _subsets("sample-10BT", "sample-100BT", "sample-350BT", "default")
    return Recipe(run, tokens=30_000_000_000, subsets=subsets)


def _prepared_shards() -> Recipe:
    """Train 140 M parameters on prepared token shards."""
    run = _small_run("prepared_shards")
    return Recipe(run, tokens=2_800_000_000, needs_text=True)


def _continue_run() -> Recipe:
    """Continue from the weights of a checkpoint on other text, with a new schedule."""
    run = _reference_run(
        "continued", MythosConfig(), lr=1e-4, global_batch=64, micro_batch=8, schedule="wsd",
        warmup_steps=100, decay_steps=500, min_lr_ratio=0.0, eval_every=500, save_every=500,
    )  # fmt: skip
    return Recipe(run, tokens=200_000_000, needs_text=True, needs_checkpoint=True)


def _small_run(name: str) -> RunConfig:
    """Return the GPU run of the small variant; Muon's rate is four times AdamW's."""
    model = variant("small")
    run = _reference_run(name, model, lr=2.4e-3, warmup_steps=500)
    run.depth, run.optim.name = mostly_at(model.max_loop_iters), "muon"
    return run


def _reference_run(name: str, model: MythosConfig, *, lr: float, **train: Any) -> RunConfig:
    """Return the common configuration of GPU runs, updated by ``train``."""
    common: dict[str, Any] = {
        "seq_len": 2048, "global_batch": 128, "micro_batch": 16, "dtype": "auto",
        "checkpoint_loops": True, "eval_every": 1000, "save_every": 1000,
        "out_dir": f"runs/{name}",
    }  # fmt: skip
    return RunConfig(
        model=model,
        depth=DepthConfig(plan="poisson", mean=8.0, max_loops=16),
        optim=OptimConfig(lr=lr, weight_decay=0.1),
        train=TrainConfig(**common | train),
    )


def _subsets(*names: str) -> dict[str, str]:
    """Return the sources of subsets of FineWeb-Edu (arXiv 2406.17557)."""
    from open_mythos.data.corpus import fineweb_edu  # loads torch

    return {name: fineweb_edu(name) for name in names}


RECIPES: dict[str, Callable[[], Recipe]] = {
    "debug_cpu": _debug_cpu,
    "140m_fine_web_edu": _140m,
    "370m_fine_web_edu": _370m,
    "3b_fine_web_edu": _3b,
    "prepared_shards": _prepared_shards,
    "continue_run": _continue_run,
}
