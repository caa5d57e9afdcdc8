"""Small noisy models and unequal batches."""

import torch

from open_mythos.config import MythosConfig
from open_mythos.data.batch import IGNORE_INDEX, Batch

VOCAB = 61


def config(**changes) -> MythosConfig:
    fields = {
        "vocab_size": VOCAB, "dim": 32, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64,
        "max_loop_iters": 4, "prelude_layers": 1, "coda_layers": 1, "kv_lora_rank": 20,
        "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 10,
        "n_experts": 8, "n_shared_experts": 1, "n_experts_per_tok": 2, "expert_dim": 16,
        "lora_rank": 3,
    }  # fmt: skip
    return MythosConfig(**{**fields, **changes})


def busy(model):
    """Add noise to every weight: the residual branches of a fresh model are zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(rows: int, tokens: int, seed: int, *, ignored: int = 0, documents: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (rows, tokens + 1), generator=generator)
    targets = ids[:, 1:].clone()
    targets[:, :ignored] = IGNORE_INDEX
    document = torch.arange(tokens).div(5, rounding_mode="floor").expand(rows, -1)
    return Batch(ids[:, :-1], targets, document if documents else None, torch.arange(rows))


# unequal batches, so that a mean of means differs
BATCHES = [batch(3, 20, 0), batch(2, 7, 1, ignored=5), batch(1, 30, 2, documents=True)]
TOKENS = 60 + 4 + 30
