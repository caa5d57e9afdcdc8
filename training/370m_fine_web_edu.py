"""A reference run of 370 million parameters on FineWeb-Edu, 20 tokens per parameter, for one node.

    python training/370m_fine_web_edu.py --dry-run
    torchrun --nproc_per_node=8 training/370m_fine_web_edu.py

GPT-2's vocabulary of 50,304; 64 experts, of which a token uses 4 and the shared one.
"""

import sys

from open_mythos import MythosConfig
from open_mythos.cli.recipe import run_recipe
from open_mythos.data import fineweb_edu
from open_mythos.train import DepthConfig, OptimConfig, RunConfig, TrainConfig

RUN = RunConfig(
    model=MythosConfig(
        dim=1024, n_heads=16, max_seq_len=2048, max_output_tokens=2048, max_loop_iters=8,
        prelude_layers=3, coda_layers=3, kv_lora_rank=256, q_lora_rank=512, qk_rope_head_dim=32,
        qk_nope_head_dim=64, v_head_dim=64, n_experts=64, n_shared_experts=1, n_experts_per_tok=4,
        expert_dim=1024, lora_rank=8,
    ),
    depth=DepthConfig(plan="poisson", mean=8.0, max_loops=16),
    optim=OptimConfig(lr=4e-4, weight_decay=0.1),
    train=TrainConfig(
        seq_len=2048, global_batch=256, micro_batch=8, schedule="cosine", warmup_steps=1000,
        dtype="auto", checkpoint_loops=True, eval_every=1000, save_every=1000,
        out_dir="runs/370m_fine_web_edu",
    ),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(
        run_recipe(
            RUN, description="370 million parameters on FineWeb-Edu.", tokens=7_400_000_000,
            tokenizer="openai-community/gpt2",
            subsets={name: fineweb_edu(name) for name in ("sample-10BT", "sample-100BT")},
        )
    )  # fmt: skip
