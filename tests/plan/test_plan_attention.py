"""The plan follows the attention layers where these choose between ways."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.plan_memory import Case, row
from open_mythos.model.layers import mla
from open_mythos.plan import layers
from open_mythos.plan.memory import _forward_bytes, _held_parts, _step_peak

TOLERANCE = 0.01
LATENT = (
    ("kv_lora_rank", 8), ("qk_rope_head_dim", 8), ("qk_nope_head_dim", 24), ("v_head_dim", 16),
    ("n_experts", 0),
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Kernels take scratch memory for every thread they have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    forget()


def forget() -> None:
    """What has been planned before."""
    for planned in (_held_parts, _forward_bytes, _step_peak):
        planned.cache_clear()


def test_the_bound_is_the_layers():
    assert layers.SCORES_AT_ONCE == mla.SCORES_AT_ONCE


def test_values_wider_than_keys():
    wide = (("qk_nope_head_dim", 8), ("v_head_dim", 40), ("n_experts", 0))
    found = row(Case("wide values", model=wide, loops=2))
    assert abs(found.error) < TOLERANCE


def test_too_many_scores_are_not_kept(monkeypatch: pytest.MonkeyPatch):
    """A layer that would be absorbed is expanded, here and in the plan."""
    absorbed = row(Case("latent scores", model=LATENT, loops=2, tokens=96))
    for module in (mla, layers):
        monkeypatch.setattr(module, "SCORES_AT_ONCE", 1000)
    forget()
    expanded = row(Case("no latent scores", model=LATENT, loops=2, tokens=96))
    for found in (absorbed, expanded):
        assert abs(found.error) < TOLERANCE
    assert expanded.measured < 0.97 * absorbed.measured
