"""Recipe of a model that measures distances in a graph by looping."""

from __future__ import annotations

import torch

from experiments.tasks import TaskLoader
from experiments.tasks.distances import Distances
from experiments.training import build, seeded
from open_mythos.config import MythosConfig
from open_mythos.train import DepthConfig, OptimConfig, RunConfig, TrainConfig
from open_mythos.train.build import Model

TASK = Distances()
TRAINED_LOOPS = 8
STEPS, RATE = 1500, 3e-3


def recipe(*, quick: bool = False, lr: float = RATE, steps: int = STEPS) -> RunConfig:
    """Return the run configuration; ``quick`` makes it tiny for smoke tests."""
    dim, batch, steps = (16, 4, 3) if quick else (64, 64, steps)
    model = MythosConfig(
        vocab_size=TASK.vocab_size, dim=dim, n_heads=4, n_kv_heads=4, attn_type="gqa",
        max_seq_len=TASK.length, max_loop_iters=TRAINED_LOOPS, prelude_layers=0,
        recurrent_layers=2, coda_layers=0, n_experts=0, lora_rank=0, ffn_dim=2 * dim,
        rope_theta=0.0, causal=False,
    )  # fmt: skip
    return RunConfig(
        model=model,
        depth=DepthConfig(plan="mixed", mean=TRAINED_LOOPS, mixed_share=0.5),
        optim=OptimConfig(name="muon", lr=lr, beta2=0.98),
        train=TrainConfig(
            steps=steps, warmup_steps=min(50, steps), seq_len=TASK.length, global_batch=batch,
            min_lr_ratio=0.02, log_every=max(1, steps // 40), device="cpu",
        ),
    )  # fmt: skip


def untrained(run: RunConfig, *, unrolled: int | None = None) -> Model:
    """Build the model, or a dense one as deep as ``unrolled`` loops.

    The embedding of an edge starts as the sum of a vector of its tail and one of its head, those of
    the source and of a question contain the head and the tail of their node.
    """
    model = build(run, unrolled=unrolled)
    n = TASK.nodes
    std = model.embedding.weight.std().item() / 2**0.5  # of each of the two
    with seeded(run.train.seed, "distances/embedding"), torch.no_grad():
        tail_nD, head_nD, kinds_2D = (std * torch.randn(rows, model.cfg.dim) for rows in (n, n, 2))
        edges_ND = (tail_nD.unsqueeze(1) + head_nD).flatten(0, 1)
        rows = torch.cat([edges_ND, head_nD + kinds_2D[0], tail_nD + kinds_2D[1]])
        model.embedding.weight.copy_(rows)
    return model


def graphs(run: RunConfig) -> TaskLoader:
    """Return the training data."""
    return TaskLoader(TASK, global_batch=run.train.global_batch)
