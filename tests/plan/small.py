"""Small jobs, and the tolerance of the comparison with measured steps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.plan_memory import Row
from open_mythos.config import MythosConfig
from open_mythos.plan import Job
from open_mythos.variants import variant

WITHIN = 0.03
CPU_ONLY = {"Muon": 0.08}
"""With Muon on a stack of experts, CPU kernels convert the bfloat16 update to float32 internally,
where no tracker sees it: a fourteenth of the memory of so small a model."""
SMALL = MythosConfig(
    vocab_size=320, dim=64, n_heads=4, n_kv_heads=2, max_seq_len=256, max_loop_iters=4,
    prelude_layers=1, coda_layers=1, kv_lora_rank=32, q_lora_rank=24, qk_rope_head_dim=8,
    qk_nope_head_dim=16, v_head_dim=16, n_experts=8, n_shared_experts=1, n_experts_per_tok=2,
    expert_dim=32, lora_rank=4,
)  # fmt: skip
DENSE_FFN = {"n_experts": 0}


def small_job(loops: int = 4, model: dict | None = None, **changes: object) -> Job:
    """Return a job of the small model with sequences of 32 tokens."""
    fields: dict = {"context": 32, "n_loops": loops, "max_loops": loops}
    return Job(replace(SMALL, **(model or {})), **(fields | changes))


def job_of(name: str, **changes: object) -> Job:
    """Return a job of a variant at its full depth."""
    cfg = variant(name)
    fields: dict = {"context": min(4096, cfg.max_seq_len), "n_loops": cfg.max_loop_iters}
    return Job(cfg, **(fields | {"max_loops": cfg.max_loop_iters} | changes))


def check(row: Row) -> None:
    """Check that the planned peak matches the measured step."""
    assert row.planned == pytest.approx(row.measured, rel=CPU_ONLY.get(row.name, WITHIN)), row
