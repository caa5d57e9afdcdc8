"""Small models whose every parameter matters, and how to compare what they compute."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from open_mythos import MythosConfig, OpenMythos

ATTENTION_TYPES = ("mla", "gqa")


def choices_of(field: str) -> tuple[str, ...]:
    """The values that a field of the configuration accepts."""
    return MythosConfig.__dataclass_fields__[field].metadata["choices"]


TOLERANCE = 1e-4
"""Largest difference allowed between two ways to compute logits, in units of their deviation."""

Model = TypeVar("Model", bound=nn.Module)


def small_config(attn_type: str = "mla", **changes: object) -> MythosConfig:
    """Every part switched on, no two widths equal that could be mistaken for one another."""
    fields: dict = {
        "vocab_size": 61, "dim": 32, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64,
        "max_loop_iters": 4, "prelude_layers": 1, "coda_layers": 1, "attn_type": attn_type,
        "kv_lora_rank": 20, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
        "v_head_dim": 10, "n_experts": 8, "n_shared_experts": 1, "n_experts_per_tok": 2,
        "expert_dim": 16, "lora_rank": 3, "max_output_tokens": 64,
    }  # fmt: skip
    return MythosConfig(**{**fields, **changes})


@torch.no_grad()
def randomise(model: Model, seed: int = 0) -> Model:
    """Give every parameter (and the router bias) a value that matters.

    A fresh model has output projections and adapters at zero, so nearly every invariant would hold
    trivially. Branches are scaled so that logits are of order one and many loops are not chaotic.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith(("log_A", "dt_bias")):
            value.add_(0.5 * noise)
        elif name.endswith("router_bias"):
            value.copy_(0.1 * noise)
        elif "norm" in name:
            value.copy_(1 + 0.2 * noise)
        elif name.endswith(("injection.B", "readout.weight")):
            value.add_(0.5 * noise / value.shape[-1] ** 0.5)
        elif name.endswith(("embedding.weight", "gate.bias")):
            value.copy_(noise)
        else:
            stacked = value.dim() == 3  # (E, in, out); the weight of a Linear is (out, in)
            value.copy_(0.9 * noise / value.shape[-2 if stacked else -1] ** 0.5)
    return model


def small_model(attn_type: str = "mla", seed: int = 0, **changes: object) -> OpenMythos:
    """A randomised :func:`small_config` model in evaluation mode."""
    return randomise(OpenMythos(small_config(attn_type, **changes)), seed).eval()


def random_ids(batch: int, length: int, seed: int = 0, vocab_size: int = 61) -> Tensor:
    """(batch, length) token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (batch, length), generator=generator)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, in units of the standard deviation of ``expected``."""
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.std())


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Equal up to rounding."""
    assert distance(actual, expected) <= tolerance


def assert_differs(actual: Tensor, expected: Tensor) -> None:
    """Different by far more than rounding: the negative control of :func:`assert_same`."""
    assert distance(actual, expected) > 100 * TOLERANCE
