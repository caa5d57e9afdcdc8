"""Recipe of small models that see a whole puzzle at once and loop over it."""

from __future__ import annotations

from open_mythos.config import MythosConfig
from open_mythos.train import DepthConfig, OptimConfig, RunConfig, TrainConfig


def puzzle_recipe(
    vocab_size: int, length: int, *, loops: int, lr: float, steps: int, dim: int = 64,
    batch: int = 64, mixed_share: float = 0.5, quick: bool = False, seed: int = 0,
) -> RunConfig:  # fmt: skip
    """Return the run of two blocks of width ``dim``, at ``loops`` loops.

    The depth of a share of the rows, ``mixed_share``, is uniform on 1 .. 2 ``loops`` instead.
    Attention has no positions: a token of ``vocab_size`` says itself where it stands among the
    ``length``. ``quick`` makes the run tiny for smoke tests.
    """
    if quick:
        dim, batch, steps = 16, 4, 3
    heads = max(4, dim // 16)
    model = MythosConfig(
        vocab_size=vocab_size, dim=dim, n_heads=heads, n_kv_heads=heads, attn_type="gqa",
        max_seq_len=length, max_loop_iters=loops, prelude_layers=0, recurrent_layers=2,
        coda_layers=0, n_experts=0, lora_rank=0, ffn_dim=2 * dim, rope_theta=0.0, causal=False,
    )  # fmt: skip
    return RunConfig(
        model=model,
        depth=DepthConfig(plan="mixed", mean=loops, mixed_share=mixed_share),
        optim=OptimConfig(name="muon", lr=lr, beta2=0.98),
        train=TrainConfig(
            seed=seed, steps=steps, warmup_steps=min(50, steps), seq_len=length,
            global_batch=batch, min_lr_ratio=0.02, log_every=max(1, steps // 40), device="cpu",
        ),
    )  # fmt: skip
