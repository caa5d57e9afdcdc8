"""The plan of a training run: layout, memory, time and cost."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from open_mythos.accounting import Accounting, account
from open_mythos.checks import check_count, is_number
from open_mythos.errors import ConfigError
from open_mythos.plan.choose import Wish, choose, step_seconds
from open_mythos.plan.communication import Traffic, communication
from open_mythos.plan.hardware import GPU, MFU
from open_mythos.plan.job import Job, Layout
from open_mythos.plan.memory import Memory, activations_per_loop, memory

DEFAULT_BATCH_TOKENS = 1 << 22
"""Tokens of a step where none are given."""
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Plan:
    """A training run with its layout, needs and cost; made by :func:`make_plan`.

    Attributes:
        job: What is trained.
        gpu: On what.
        layout: How it is laid out.
        memory: Of each GPU, at the worst moment of a step.
        other_memory: The same with the opposite choice of activation checkpointing; None for a
            dense model.
        activations: Bytes that a loop of a token keeps for the backward pass, without and with
            activation checkpointing.
        traffic: Communication of a step.
        compute_seconds: Seconds of a step that are computing.
        traffic_seconds: Seconds of a step that are communication.
        tokens: To train on.
        mfu: Share of the peak rate assumed while computing.
        price: US dollars of a GPU for an hour.
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
        """Tokens of an optimizer step."""
        return self.layout.global_batch * self.job.context

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return math.ceil(self.tokens / self.step_tokens)

    @property
    def flops(self) -> float:
        """Useful FLOPs of the whole training."""
        return self.tokens * self.job.training_flops()

    @property
    def step_seconds(self) -> tuple[float, float]:
        """Seconds of a step: if communication overlaps with computing, and if none of it does."""
        both = self.compute_seconds, self.traffic_seconds
        return max(both), sum(both)

    @property
    def utilisation(self) -> tuple[float, float]:
        """Useful FLOPs as a share of the peak rate (MFU), between the same bounds."""
        useful = self.step_tokens * self.job.training_flops()
        peak = self.layout.gpus * self.gpu.rate(self.job.dtype)
        best, worst = self.step_seconds
        return useful / best / peak, useful / worst / peak

    @property
    def days(self) -> tuple[float, float]:
        """Days of the whole training, between the same bounds."""
        best, worst = self.step_seconds
        return self.steps * best / 86_400, self.steps * worst / 86_400

    @property
    def gpu_hours(self) -> tuple[float, float]:
        """GPU hours, between the same bounds."""
        best, worst = self.days
        return 24 * best * self.layout.gpus, 24 * worst * self.layout.gpus

    @property
    def cost(self) -> tuple[float, float]:
        """US dollars, between the same bounds."""
        best, worst = self.gpu_hours
        return best * self.price, worst * self.price

    def depths(self) -> list[Accounting]:
        """Return counts at 1, 2, 4, ... loops up to the largest; a dense model has one depth."""
        job = self.job
        powers = [2**k for k in range(job.max_loops.bit_length()) if 2**k < job.max_loops]
        loops = [*powers, job.max_loops] if job.looped else [None]
        return [account(job.cfg, n, job.context, n_layers=job.n_layers) for n in loops]

    def cache_bytes(self, share_loops: bool = False) -> int:
        """Return the bytes of the bfloat16 inference cache of a sequence of ``max_seq_len``."""
        counts = self.job.counts
        loops = 1 if share_loops or counts.share_loops else self.job.max_loops
        slots = counts.slots_once + counts.slots_per_loop * loops
        return 2 * counts.cache_width * slots * self.job.cfg.max_seq_len

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return {
            "model": self.job.cfg.to_dict(),
            "job": {name: value for name, value in asdict(self.job).items() if name != "cfg"},
            "gpu": asdict(self.gpu) | {"usable_memory": self.gpu.usable},
            "counts": self.job.counts.to_dict(),
            "depths": [each.to_dict() for each in self.depths()],
            "layout": self.layout.to_dict(),
            "memory": _as_dict(self.memory),
            "other_memory": self.other_memory and _as_dict(self.other_memory),
            "activation_bytes_per_token_and_loop": self.activations,
            "traffic": [asdict(each) for each in self.traffic],
            "step": {
                "tokens": self.step_tokens, "flops": self.step_tokens * self.job.training_flops(),
                "compute_seconds": self.compute_seconds, "traffic_seconds": self.traffic_seconds,
            },
            "training": {
                "tokens": self.tokens, "steps": self.steps, "flops": self.flops, "mfu": self.mfu,
                "price": self.price, "utilisation": self.utilisation, "days": self.days,
                "gpu_hours": self.gpu_hours, "cost": self.cost,
            },
            "cache": {
                "positions": self.job.cfg.max_seq_len, "bytes": self.cache_bytes(),
                "bytes_shared": self.cache_bytes(share_loops=True),
            },
        }  # fmt: skip


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
    """Choose a layout of ``job`` over ``gpus`` and estimate what it takes.

    Args:
        job: What is trained.
        gpu: On what.
        gpus: On how many.
        tokens: To train on.
        batch_tokens: Tokens of a step, rounded to equally many sequences on every GPU; 0 for 4 Mi,
            or one sequence per GPU if that is more.
        mfu: Share of the peak rate while computing, in (0, 1].
        price: US dollars of a GPU for an hour; by default that of the table.
        wish: The parts of the layout that are fixed.

    Raises:
        DoesNotFitError: No layout fits.
        ConfigError: A number is out of range.
    """
    check_count("gpus", gpus)
    price = gpu.price if price is None else price
    for name, value, holds, allowed in (
        ("tokens", tokens, tokens > 0, "a number > 0"),
        ("mfu", mfu, is_number(mfu) and 0 < mfu <= 1, "0 < mfu <= 1"),
        ("price", price, is_number(price) and price >= 0, "a number >= 0"),
        ("global_batch_tokens", batch_tokens, batch_tokens >= 0, "a number >= 0"),
    ):
        if not holds:
            raise ConfigError(
                f"{name} is out of range", where=name, value=value, allowed=allowed,
                fix=f"correct {name}",
            )  # fmt: skip
    local_batch = _local_batch(job, gpus, batch_tokens)
    layout = choose(job, gpu, gpus, local_batch, mfu, wish)
    computing, sending = step_seconds(job, gpu, layout, mfu)
    other = _with_other_checkpointing(layout) if job.looped else None
    return Plan(
        job, gpu, layout, memory(job, layout), None if other is None else memory(job, other),
        activations_per_loop(job) if job.looped else {}, communication(job, layout, gpu),
        computing, sending, tokens, mfu, price,
    )  # fmt: skip


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


def _local_batch(job: Job, gpus: int, batch_tokens: float) -> int:
    """Return the sequences of a step for each GPU."""
    wanted = (batch_tokens or DEFAULT_BATCH_TOKENS) / job.context / gpus
    if batch_tokens and wanted < 1:
        raise ConfigError(
            "a step has fewer sequences than there are GPUs", where="global_batch_tokens",
            value=batch_tokens, allowed=f"at least {gpus:,} sequences of {job.context:,} tokens: "
            f"{gpus * job.context:,}",
            fix="raise it, shorten the context, or take fewer GPUs",
        )  # fmt: skip
    return max(1, round(wanted))


def _with_other_checkpointing(layout: Layout) -> Layout:
    return replace(layout, checkpoint_loops=not layout.checkpoint_loops)


def _as_dict(found: Memory) -> dict[str, Any]:
    return {"parts": found.parts, "total": found.total, "moment": found.moment}
