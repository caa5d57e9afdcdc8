"""First steps: build a model, run it at two depths, generate, and read its spectral radius.

python examples/usage.py
"""

import torch

from open_mythos.main import MythosConfig, OpenMythos

SHARED = {
    "vocab_size": 1000, "dim": 256, "n_heads": 8, "max_seq_len": 128, "max_loop_iters": 4,
    "prelude_layers": 1, "coda_layers": 1, "n_experts": 8, "n_shared_experts": 1,
    "n_experts_per_tok": 2, "expert_dim": 64, "lora_rank": 8,
}  # fmt: skip
CONFIGS = {
    "gqa": MythosConfig(**SHARED, attn_type="gqa", n_kv_heads=2),
    "mla": MythosConfig(
        **SHARED, attn_type="mla", n_kv_heads=8, kv_lora_rank=32, q_lora_rank=64,
        qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
    ),
}  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    for name, cfg in CONFIGS.items():
        model = OpenMythos(cfg).eval()
        ids = torch.randint(0, cfg.vocab_size, (2, 16))

        # Depth is an argument of the call: the same weights, four loops or one.
        logits = model(ids, n_loops=4)
        # It may also exceed max_loop_iters, and may differ between the rows of a batch.
        mixed = model(ids, n_loops=[2, 9])
        out = model.generate(ids, max_new_tokens=8, n_loops=8)

        A = model.recurrent.injection.get_A()
        rho = torch.linalg.eigvals(A).abs().max().item()

        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"[{name}] parameters        {parameters:,}")
        print(f"[{name}] logits            {tuple(logits.shape)}, and per row {tuple(mixed.shape)}")
        print(f"[{name}] generated         {tuple(out.shape)}, prompt included")
        print(f"[{name}] cache per token   {cfg.cache_width} elements per layer and loop")
        print(f"[{name}] rho(A)            {rho:.4f}, below 1 for every parameter value")


if __name__ == "__main__":
    main()
