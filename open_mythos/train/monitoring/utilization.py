"""Throughput and hardware utilization: FLOPs of the executed loops over the device's peak.

This module loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from open_mythos.accounting import Accounting


class Peak(NamedTuple):
    """Dense peak of one device in TFLOP/s, without sparsity; None where it has no such units."""

    half: float | None
    """bfloat16 with float32 accumulation."""
    tf32: float | None
    """float32 matmuls with TF32 inputs, which PyTorch uses only if enabled."""
    float32: float
    """Full float32."""
    source: str
    """Document of the vendor."""


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
"""Pattern of the device name as PyTorch reports it -> its peak; the first match counts."""


def device_peak(name: str, dtype: str, *, tf32: bool = False) -> float | None:
    """Return the peak of one device in FLOP/s; None if the table has no entry.

    Args:
        name: Result of ``torch.cuda.get_device_name()``, such as "NVIDIA H100 80GB HBM3".
        dtype: Dtype of the matmuls: "bfloat16", "float16" (same speed) or "float32".
        tf32: Whether float32 matmuls may use TF32.
    """
    peak = next((peak for pattern, peak in PEAKS if re.search(pattern, name)), None)
    if peak is None:
        return None
    single = peak.tf32 if tf32 and peak.tf32 is not None else peak.float32
    found = single if dtype == "float32" else peak.half
    return None if found is None else found * 1e12


class Utilization:
    """Accumulates steps between two lines of metrics.

    Counts model FLOPs only: recomputation under activation checkpointing and skipped optimizer
    updates add none, though their time counts.

    Args:
        counts: Accounting of the model at the run's sequence length.
        grad_loops: Last loops of each sequence that carry gradient; None for all.
        peak_flops: Peak FLOP/s of all devices of the run together; None if unknown.
    """

    def __init__(
        self, counts: Accounting, grad_loops: int | None = None, peak_flops: float | None = None
    ) -> None:
        self.counts, self.grad_loops, self.peak_flops = counts, grad_loops, peak_flops
        self._flops = self._seconds = 0.0
        self._tokens = 0

    def step_flops(self, depths: Iterable[int] | None, sequences: int, length: int) -> float:
        """Return the FLOPs of forward and backward pass of one step.

        ``depths`` are the loops of each sequence of ``length`` tokens; None for a dense model.
        """
        if depths is None:
            return sequences * length * self.counts.training_flops(context=length)
        return length * sum(
            self.counts.training_flops(depth, self.grad_loops, length) for depth in depths
        )

    def add(self, seconds: float, tokens: int, flops: float) -> None:
        """Add the time, the targets and the :meth:`step_flops` of one step."""
        self._seconds, self._tokens = self._seconds + seconds, self._tokens + tokens
        self._flops += flops

    def metrics(self) -> dict[str, Any]:
        """Return the rates since the last call: "tokens_per_second", "flops_per_second" and, where
        the peak is known, "mfu" (model FLOP utilization, 0 to 1). Empty if no time has passed."""
        seconds, tokens, flops = self._seconds, self._tokens, self._flops
        self._flops, self._seconds, self._tokens = 0.0, 0.0, 0
        if not seconds:
            return {}
        rates = {"tokens_per_second": tokens / seconds, "flops_per_second": flops / seconds}
        if self.peak_flops:
            rates["mfu"] = flops / seconds / self.peak_flops
        return rates
