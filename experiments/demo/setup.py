"""Configuration of the demo's text models and of all evaluations.

Looped and dense models have equal parameter counts and see the same samples in the same order. The
chain models use the recipe of ``experiments.c1_depth``.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

from open_mythos.config import MythosConfig
from open_mythos.train.config import DataConfig, DepthConfig, OptimConfig, RunConfig, TrainConfig

VOCABULARY = 1024
TRAINED_DEPTH = 4
EVAL_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 32)
"""Loops evaluated on text, up to eight times the mean trained depth."""
PROMPT = "def read_lines(path):\n    "
SAMPLE_DEPTHS = (1, TRAINED_DEPTH, 4 * TRAINED_DEPTH)
SAMPLE_TOKENS = 60
TEST_HOPS = (2, 3, 4, 5, 6, 8, 10, 12, 15)
HOP_LOOPS = (1, 2, 5, 8, 10, 12, 16, 24, 64, 128)
EXIT_RULE = "kl:0.0001,0.1"
"""Early-exit rule for chains; it does not know their length."""


def text_config(folder: Path, seed: int, quick: bool) -> RunConfig:
    """Configure the language model; ``folder`` holds the shards in ``data`` and the outputs."""
    model = MythosConfig(
        vocab_size=VOCABULARY, dim=128, n_heads=4, n_kv_heads=4, max_seq_len=512,
        max_loop_iters=TRAINED_DEPTH, prelude_layers=1, coda_layers=1, max_output_tokens=512,
        kv_lora_rank=32, q_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=32,
        n_experts=8, n_shared_experts=1, n_experts_per_tok=2, expert_dim=64, lora_rank=0,
        ffn_dim=256, tie_embeddings=True,
    )  # fmt: skip
    return RunConfig(
        model=model,
        data=DataConfig(path=str(folder / "data"), eval_windows=8 if quick else 64),
        depth=DepthConfig(plan="poisson", mean=TRAINED_DEPTH, max_loops=2 * TRAINED_DEPTH),
        optim=OptimConfig(lr=6e-3),
        train=TrainConfig(
            seed=seed, steps=6 if quick else 170, warmup_steps=2 if quick else 30, seq_len=128,
            global_batch=16, device="cpu", log_every=2 if quick else 5, min_lr_ratio=0.02,
            eval_depths=list(EVAL_DEPTHS), out_dir=str(folder / "looped"),
        ),
    )  # fmt: skip


def dense_counterpart(config: RunConfig) -> RunConfig:
    """Return the same run for a dense transformer with an equal parameter count."""
    dense = deepcopy(config)
    dense.architecture, dense.train.grad_loops = "dense", None
    if dense.train.out_dir is not None:
        dense.train.out_dir = str(Path(dense.train.out_dir).with_name("dense"))
    return dense
