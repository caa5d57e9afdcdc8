"""Models whose dynamics are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import small_config, small_model

from open_mythos import OpenMythos


@pytest.fixture(scope="session")
def linear_model() -> OpenMythos:
    """Blocks and adapters add nothing, as at the start of training: a loop is exactly A h + B e."""
    model = OpenMythos(small_config("gqa")).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        model.recurrent.injection.log_A.copy_(torch.randn(model.cfg.dim, generator=generator))
    return model


@pytest.fixture(scope="session")
def contracting_model() -> Callable[[str], OpenMythos]:
    """Attention, experts and adapters that matter, and still a single resting place."""

    def make(attn_type: str) -> OpenMythos:
        model = small_model(attn_type)
        with torch.no_grad():
            for name, weight in model.recurrent.named_parameters():
                if "out_proj" in name or "down" in name:
                    weight.mul_(0.1)
        return model

    return make
