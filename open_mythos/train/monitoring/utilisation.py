"""How much of the hardware a run uses: FLOPs of the loops that ran over the peak of the device.

This module loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from open_mythos.accounting import Accounting


@dataclass(frozen=True)
class Peak:
    """Dense peak of one device in TFLOP/s, without the doubling that sparsity is advertised with.

    None where the device has no such units.
    """

    half: float | None
    """bfloat16 with float32 accumulation."""
    tf32: float | None
    """float32 products rounded to TF32, which PyTorch does only if told to."""
    float32: float
    """float32 proper."""
    source: str
    """The vendor's document."""


PEAKS: tuple[tuple[str, Peak], ...] = (
    (r"\bB200\b", Peak(2250, 1100, 75, "NVIDIA HGX B200 data sheet, one eighth of the board")),
    (r"\bGH200\b", Peak(989.4, 494.7, 66.9, "NVIDIA GH200 data sheet")),
    (r"\bH200 NVL\b", Peak(835.5, 417.5, 60, "NVIDIA H200 data sheet, NVL column")),
    (r"\bH200\b", Peak(989.4, 494.7, 66.9, "NVIDIA H200 data sheet, SXM column")),
    (r"\bH100 NVL\b", Peak(835.5, 417.5, 60, "NVIDIA H100 data sheet, NVL column")),
    (r"\bH100 PCIe\b", Peak(756, 378, 51.2, "NVIDIA H100 architecture white paper, PCIe column")),
    (r"\bH100\b", Peak(989.4, 494.7, 66.9, "NVIDIA H100 architecture white paper, SXM5 column")),
    (r"\bA100\b", Peak(312, 156, 19.5, "NVIDIA A100 data sheet")),
    (r"\bL40S\b", Peak(362, 183, 91.6, "NVIDIA L40S data sheet")),
    (r"\bL4\b", Peak(121, 60, 30.3, "NVIDIA L4 data sheet")),
    (r"\bA10\b", Peak(125, 62.5, 31.2, "NVIDIA A10 data sheet")),
    (r"\bV100\b", Peak(None, None, 15.7, "NVIDIA V100 data sheet, SXM2 column")),
    (r"\bT4\b", Peak(None, None, 8.1, "NVIDIA T4 data sheet")),
    (r"\bMI300X\b", Peak(1307.4, 653.7, 163.4, "AMD Instinct MI300X data sheet")),
)
"""Pattern of the device's name, as PyTorch gives it -> its peak; the first that matches counts."""


def device_peak(name: str, dtype: str, *, tf32: bool = False) -> float | None:
    """Peak of one device in FLOP/s; None if it is not in the table, which is no guess.

    Args:
        name: As ``torch.cuda.get_device_name()`` gives it: "NVIDIA H100 80GB HBM3".
        dtype: Of the products: "bfloat16", "float16" (same speed) or "float32".
        tf32: Whether float32 products may be rounded to TF32.
    """
    for pattern, peak in PEAKS:
        if re.search(pattern, name):
            full = peak.tf32 if tf32 and peak.tf32 is not None else peak.float32
            found = full if dtype == "float32" else peak.half
            return None if found is None else found * 1e12
    return None


class Utilisation:
    """Adds up the steps between two lines of metrics.

    Model FLOPs only: what activation checkpointing computes again, and skipped optimizer updates,
    are no useful work and add nothing, though their time counts.

    Args:
        counts: Of the model, made with the run's sequence length as its context.
        grad_loops: Last loops of each sequence that carry gradient; None for all.
        peak_flops: Peak FLOP/s of all devices of the run together; None if it is not known.
    """

    def __init__(
        self, counts: Accounting, grad_loops: int | None = None, peak_flops: float | None = None
    ) -> None:
        self.counts, self.grad_loops, self.peak_flops = counts, grad_loops, peak_flops
        self._flops = self._seconds = 0.0
        self._tokens = 0

    def step_flops(self, depths: Iterable[int] | None, sequences: int, length: int) -> float:
        """FLOPs of forward and backward pass of one step, each sequence at its own depth.

        Args:
            depths: Loops of each sequence; None for a dense model.
            sequences: Sequences of the step.
            length: Tokens T of each.
        """
        if depths is None:
            return sequences * length * self.counts.training_flops(context=length)
        return length * sum(
            self.counts.training_flops(depth, self.grad_loops, length) for depth in depths
        )

    def add(self, seconds: float, tokens: int, flops: float) -> None:
        """Count one step: its time, the targets it learnt from, and :meth:`step_flops`."""
        self._seconds, self._tokens = self._seconds + seconds, self._tokens + tokens
        self._flops += flops

    def metrics(self) -> dict[str, Any]:
        """The rates since the last call: "tokens_per_second", "flops_per_second" and, where the
        peak is known, "mfu" (model FLOP utilisation, from 0 to 1). Empty if no time has passed."""
        seconds, tokens, flops = self._seconds, self._tokens, self._flops
        self._flops, self._seconds, self._tokens = 0.0, 0.0, 0
        if not seconds:
            return {}
        rates = {"tokens_per_second": tokens / seconds, "flops_per_second": flops / seconds}
        if self.peak_flops:
            rates["mfu"] = flops / seconds / self.peak_flops
        return rates
