"""The plan of a training run: layout, memory, time and cost."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from open_mythos.accounting import Accounting, account
from open_mythos.checks import check_count, check_number, checked
from open_mythos.errors import ConfigError
from open_mythos.plan.choose import MOST_GPUS, Wish, choose, step_seconds
from open_mythos.plan.communication import Traffic, communication
from open_mythos.plan.hardware import GPU, MFU
from open_mythos.plan.job import Job, Layout
from open_mythos.plan.memory import Memory, activations_per_loop, memory

DEFAULT_BATCH_TOKENS = 1 << 22
"""Default tokens per optimizer step."""
MOST_BATCH_TOKENS = 10**12
"""Most of them: the divisors of a batch are searched."""
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Plan:
    """A training run with its layout, requirements and cost, from :func:`make_plan`.

    Pairs of values are (best, worst): all communication overlaps with computing, or none does.

    Attributes:
        job: Training job.
        gpu: GPU model.
        layout: Layout over GPUs.
        memory: Peak memory per GPU.
        other_memory: The same with the opposite choice of activation checkpointing; None for a
            dense model.
        activations: Activation bytes per token and loop, without and with checkpointing.
        traffic: Communication of a step.
        compute_seconds: Compute time of a step.
        traffic_seconds: Communication time of a step.
        tokens: Training tokens.
        mfu: Assumed share of the peak rate while computing.
        price: US dollars per GPU hour.
    """

    job: Job
    gpu: GPU
    layout: Layout
    memory: Memory
    other_memory: Memory | None
    activations: dict[str, float]
    traffic: list[Traffic]
    compute_seconds: float
    traffic_seconds: float
    tokens: float
    mfu: float
    price: float

    @property
    def step_tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.layout.global_batch * self.job.context

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return math.ceil(self.tokens / self.step_tokens)

    @property
    def flops(self) -> float:
        """Useful FLOPs of the training run."""
        return self.tokens * self.job.training_flops()

    @property
    def step_seconds(self) -> tuple[float, float]:
        """Seconds per step (best, worst)."""
        both = self.compute_seconds, self.traffic_seconds
        return max(both), sum(both)

    @property
    def utilization(self) -> tuple[float, ...]:
        """Useful FLOPs as a share of the peak rate (MFU)."""
        useful = self.step_tokens * self.job.training_flops()
        peak = self.layout.gpus * self.gpu.rate(self.job.dtype)
        return tuple(useful / seconds / peak for seconds in self.step_seconds)

    @property
    def days(self) -> tuple[float, ...]:
        """Days of training."""
        return tuple(self.steps * seconds / 86_400 for seconds in self.step_seconds)

    @property
    def gpu_hours(self) -> tuple[float, ...]:
        """GPU hours of training."""
        return tuple(24 * days * self.layout.gpus for days in self.days)

    @property
    def cost(self) -> tuple[float, ...]:
        """Cost of training in US dollars."""
        return tuple(hours * self.price for hours in self.gpu_hours)

    def depths(self) -> list[Accounting]:
        """Return counts at 1, 2, 4, ... loops and the maximum; one entry for a dense model."""
        job = self.job
        powers = [2**k for k in range(job.max_loops.bit_length()) if 2**k < job.max_loops]
        loops = [*powers, job.max_loops] if job.looped else [None]
        return [account(job.cfg, n, job.context, n_layers=job.n_layers) for n in loops]

    def cache_bytes(self, share_loops: bool = False) -> int:
        """Return the bytes of the bfloat16 inference cache of a sequence of ``max_seq_len``."""
        loops = 1 if share_loops else self.job.max_loops
        return self.job.counts.cache_bytes(loops) * self.job.cfg.max_seq_len

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and derived values as JSON-ready values."""
        other, layout = self.other_memory, self.layout
        return {
            "model": self.job.cfg.to_dict(),
            "job": {name: value for name, value in asdict(self.job).items() if name != "cfg"},
            "gpu": asdict(self.gpu) | {"usable_memory": self.gpu.usable},
            "counts": self.job.counts.to_dict(),
            "depths": [each.to_dict() for each in self.depths()],
            "layout": asdict(layout) | {"global_batch": layout.global_batch},
            "memory": asdict(self.memory) | {"total": self.memory.total},
            "other_memory": other and asdict(other) | {"total": other.total},
            "activation_bytes_per_token_and_loop": self.activations,
            "traffic": [asdict(each) for each in self.traffic],
            "step": {
                "tokens": self.step_tokens, "flops": self.step_tokens * self.job.training_flops(),
                "compute_seconds": self.compute_seconds, "traffic_seconds": self.traffic_seconds,
            },
            "training": {
                "tokens": self.tokens, "steps": self.steps, "flops": self.flops, "mfu": self.mfu,
                "price": self.price, "utilization": self.utilization, "days": self.days,
                "gpu_hours": self.gpu_hours, "cost": self.cost,
            },
            "cache": {
                "positions": self.job.cfg.max_seq_len, "bytes": self.cache_bytes(),
                "bytes_shared": self.cache_bytes(share_loops=True),
            },
        }  # fmt: skip


@checked
def make_plan(
    job: Job,
    gpu: GPU,
    gpus: int,
    tokens: float,
    *,
    batch_tokens: float = 0,
    mfu: float = MFU,
    price: float | None = None,
    wish: Wish | None = None,
) -> Plan:
    """Choose a layout of ``job`` over ``gpus`` and estimate memory, time and cost.

    Args:
        job: Training job.
        gpu: GPU model.
        gpus: Number of GPUs.
        tokens: Training tokens.
        batch_tokens: Tokens per step, rounded to equally many sequences per GPU; 0 for 4 Mi, or one
            sequence per GPU if that is more.
        mfu: Share of the peak rate while computing, in (0, 1].
        price: US dollars per GPU hour; by default that of ``gpu``.
        wish: Fixed fields of the layout.

    Raises:
        DoesNotFitError: No layout fits.
        ConfigError: A number is out of range.
    """
    check_number("gpus", check_count("gpus", gpus), le=MOST_GPUS)
    price = gpu.price if price is None else price
    check_number("tokens", tokens, gt=0)
    check_number("mfu", mfu, gt=0, le=1)
    check_number("price", price, ge=0)
    check_number("global_batch_tokens", batch_tokens, ge=0, le=MOST_BATCH_TOKENS)
    local_batch = (batch_tokens or DEFAULT_BATCH_TOKENS) / job.context / gpus
    if batch_tokens and local_batch < 1:
        raise ConfigError(
            "a step has fewer sequences than GPUs", where="global_batch_tokens",
            value=batch_tokens, allowed=f"at least {gpus:,} sequences of {job.context:,} tokens: "
            f"{gpus * job.context:,}",
            fix="raise it, shorten the context, or use fewer GPUs",
        )  # fmt: skip
    layout = choose(job, gpu, gpus, max(1, round(local_batch)), mfu, wish)
    other = replace(layout, checkpoint_loops=not layout.checkpoint_loops)
    return Plan(
        job, gpu, layout, memory(job, layout), memory(job, other) if job.looped else None,
        activations_per_loop(job) if job.looped else {}, communication(job, layout, gpu),
        *step_seconds(job, gpu, layout, mfu), tokens, mfu, price,
    )  # fmt: skip


@checked
def parse_count(text: str | float, where: str) -> float:
    """Return 30e9 for "30B", "30e9" or 30e9; K, M, B and T are powers of a thousand.

    Raises:
        ConfigError: It is not such a number.
    """
    match = re.fullmatch(r"\s*([\d_.]+(?:e\+?\d+)?)\s*([KMBT]?)\s*", str(text), re.IGNORECASE)
    try:
        value = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise ConfigError(
            "not a number of tokens", where=where, value=text,
            allowed='a number > 0 such as "30B", "1.5T" or 3e10', fix=f"correct {where}",
        )  # fmt: skip
    return value
