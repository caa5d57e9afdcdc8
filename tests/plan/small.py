"""Small jobs and layouts for the tests of plans."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.plan_memory import Case, Row, model_of
from open_mythos.config import MythosConfig
from open_mythos.plan import Job
from open_mythos.variants import variant

SCRATCH = 128 << 10
"""Bytes of working memory that products of experts take in bfloat16: much for models this small."""
TOLERANCE = 0.01
"""The aim is ten percent. Since the plan follows the code line by line, more than one percent means
that the two have come apart."""
SMALL = MythosConfig(
    vocab_size=320, dim=64, n_heads=4, n_kv_heads=2, max_seq_len=256, max_loop_iters=4,
    prelude_layers=1, coda_layers=1, kv_lora_rank=32, q_lora_rank=24, qk_rope_head_dim=8,
    qk_nope_head_dim=16, v_head_dim=16, n_experts=8, n_shared_experts=1, n_experts_per_tok=2,
    expert_dim=32, lora_rank=4,
)  # fmt: skip


def small_job(loops: int = 4, model: dict | None = None, **changes: object) -> Job:
    """A job of the small model, 32 tokens a sequence."""
    fields: dict = {"context": 32, "n_loops": loops, "max_loops": loops}
    return Job(replace(SMALL, **(model or {})), **(fields | changes))


def job_of(name: str, context: int = 4096, **changes: object) -> Job:
    """A job of a variant at its full depth."""
    cfg = variant(name)
    fields: dict = {
        "context": min(context, cfg.max_seq_len), "n_loops": cfg.max_loop_iters,
        "max_loops": cfg.max_loop_iters,
    }  # fmt: skip
    return Job(cfg, **(fields | changes))


def check(case: Case, found: Row, of_step: float | None = 1) -> None:
    """The error, and with a factor of its bound that of what a step adds, are within theirs."""
    scratch = SCRATCH if case.dtype == "bfloat16" and model_of(case).n_experts else 0
    step = found.measured - found.held
    for allowed, whole in ((1.0, found.measured), (of_step, step)):
        if allowed is not None:
            off = found.planned - found.measured
            assert -allowed * TOLERANCE * whole - scratch < off < allowed * TOLERANCE * whole, found
