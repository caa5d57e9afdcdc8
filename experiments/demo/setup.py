"""Configuration of the demo's text models and of all evaluations.

The models of a task see the same samples in the same order. Chains use the recipe of
``experiments.c1_depth``, Sudokus that of ``experiments.c11_reasoning``; the text models follow
``experiments.text_recipe``.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from open_mythos.config import MythosConfig
from open_mythos.train.config import DataConfig, DepthConfig, OptimConfig, RunConfig, TrainConfig

VOCABULARY = 1024
TEXT_RATE, DENSE_TEXT_RATE = 4e-2, 1e-2
"""Best learning rates of the looped and the dense model, of those tried on seed 0."""
TRAINED_DEPTH = 4
EVAL_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 32)
"""Loops evaluated on text, up to eight times the trained depth."""
PROMPT = "def read_lines(path):\n    "
SAMPLE_DEPTHS = (1, TRAINED_DEPTH, 4 * TRAINED_DEPTH)
SAMPLE_TOKENS = 60
TEST_HOPS = (2, 3, 4, 5, 6, 8, 10, 12, 15)
HOP_LOOPS = (1, 2, 5, 8, 10, 12, 16, 24, 64, 128)
EXIT_RULE = "kl:0.0001,0.1"
"""Early-exit rule for chains; it does not know their length."""
SUDOKU_STEPS = 500
SUDOKU_LOOPS = (1, 2, 4, 6, 8, 12, 16, 32)
PUZZLES, PUZZLES_PER_LEVEL = 2000, 150
"""Sudokus made, and the most that are asked of each difficulty."""
SHOWN_LOOPS = (1, 4, 8, 16)
"""Loops after which a puzzle is shown."""


def text_config(folder: Path, seed: int, quick: bool) -> RunConfig:
    """Configure the language model; ``folder`` holds the shards in ``data`` and the outputs."""
    model = MythosConfig(
        vocab_size=VOCABULARY, dim=96, n_heads=4, n_kv_heads=4, max_seq_len=512,
        max_loop_iters=TRAINED_DEPTH, prelude_layers=0, recurrent_layers=2, coda_layers=0,
        max_output_tokens=512, attn_type="gqa", n_experts=0, lora_rank=0, ffn_dim=192,
        tie_embeddings=True,
    )  # fmt: skip
    return RunConfig(
        model=model,
        data=DataConfig(path=str(folder / "data"), eval_windows=8 if quick else 128),
        depth=DepthConfig(plan="mixed", mean=TRAINED_DEPTH),
        optim=OptimConfig(name="muon", lr=TEXT_RATE),
        train=TrainConfig(
            seed=seed, steps=6 if quick else 500, warmup_steps=2 if quick else 50, seq_len=128,
            global_batch=16, device="cpu", log_every=2 if quick else 10, min_lr_ratio=0.02,
            eval_depths=list(EVAL_DEPTHS), out_dir=str(folder / "looped"),
        ),
    )  # fmt: skip


def dense_counterpart(
    config: RunConfig, name: str = "dense", *, blocks: int = 1, lr: float | None = None
) -> RunConfig:
    """Return the same run for a dense transformer, in the folder ``name``.

    It has as many parameters as the looped model, or as one that stores ``blocks`` times the
    blocks. ``lr`` is its own learning rate.
    """
    dense = deepcopy(config)
    dense.architecture, dense.train.grad_loops = "dense", None
    stored = blocks * dense.model.recurrent_layers
    dense.model = replace(dense.model, recurrent_layers=stored)
    dense.optim.lr = lr or dense.optim.lr
    if dense.train.out_dir is not None:
        dense.train.out_dir = str(Path(dense.train.out_dir).with_name(name))
    return dense
