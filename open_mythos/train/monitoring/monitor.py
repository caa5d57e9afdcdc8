"""Monitoring of a run: loss spikes, loop alarms, throughput and hardware utilization."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from open_mythos.accounting import account
from open_mythos.distributed import over_ranks, world_size
from open_mythos.model.mythos import OpenMythos
from open_mythos.train.build import Model
from open_mythos.train.config import RunConfig
from open_mythos.train.loop_summary import LoopSummary
from open_mythos.train.monitoring.alarms import (
    LoopWatchdog,
    first_judged_step,
    loop_losses,
    relative_gap,
)
from open_mythos.train.monitoring.metrics import Metrics
from open_mythos.train.monitoring.spikes import SpikeDetector
from open_mythos.train.monitoring.utilization import Utilization, device_peak
from open_mythos.train.parallel.parallelize import ParallelModel
from open_mythos.train.state import StepResult, TokenBatch

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 1000
"""Minimum tokens for the probe that compares the loss of one loop with that of the mean depth."""


class Monitor:
    """Measures a run of ``config`` and detects its failures; ``dtype`` is that of the matmuls."""

    def __init__(
        self, model: Model, config: RunConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        train, watch = config.train, config.watch
        self._device, self._dtype = device, dtype
        self._depth = max(1, round(config.depth.expected))
        counts = account(model, context=train.seq_len)
        peak = watch.peak_flops
        if peak is None and device.type == "cuda":
            peak = device_peak(
                torch.cuda.get_device_name(device), str(dtype).removeprefix("torch."),
                tf32=torch.backends.cuda.matmul.allow_tf32,
            )  # fmt: skip
        self._use = Utilization(counts, config.grad_loops, peak and peak * world_size())
        self.spikes = SpikeDetector(watch.spike_window, watch.spike_threshold, watch.spike_patience)
        self._watchdog = None
        if isinstance(model, OpenMythos) and watch.watchdog:
            start = first_judged_step(train.steps, train.warmup_steps)
            self._watchdog = LoopWatchdog(model.cfg, start=start)

    def add(self, seconds: float, result: StepResult) -> None:
        """Count the time and the FLOPs of a step in this process."""
        depths = None if result.depths is None else result.depths.tolist()
        flops = self._use.step_flops(depths, *result.batch.input_ids.shape)
        self._use.add(seconds, result.counts.tokens, flops)

    def rates(self) -> Metrics:
        """Return the throughput of all processes since the last call."""
        rates = self._use.metrics()
        for name in ("flops_per_second", "mfu"):
            # tokens are counted over all processes, FLOPs over this process's sequences
            if name in rates:
                rates[name] = sum(over_ranks([rates[name]])[0])
        return rates

    def look(
        self, step: int, summary: LoopSummary, parallel: ParallelModel, batch: TokenBatch
    ) -> Metrics:
        """Return the alarms that this logged step raises, and those that are still active.

        ``summary`` covers all processes, ``batch`` is this one's; part of it is used to measure the
        gain from looping.
        """
        if self._watchdog is None:
            return {}
        gap = None
        if step >= self._watchdog.start and self._depth > 1:
            part = batch.split(_parts(*batch.input_ids.shape))[0].to(self._device)
            losses = partial(loop_losses, batch=part, depth=self._depth, dtype=self._dtype)
            gap = relative_gap(*parallel.look_at(losses))
        alarms = self._watchdog.observe(step, summary, loop_gap=gap)
        for alarm in alarms:
            logger.warning("%s", alarm)
        metrics: Metrics = {} if gap is None else {"loop_gap": gap}
        if alarms:
            metrics["alarms"] = [asdict(alarm) for alarm in alarms]
        if self._watchdog.active:
            metrics["alarms_active"] = self._watchdog.active
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return the state of spike detector and watchdog, JSON-ready."""
        dog = {} if self._watchdog is None else {"watchdog": self._watchdog.state_dict()}
        return {"spikes": self.spikes.state_dict(), **dog}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.spikes.load_state_dict(state["spikes"])
        if self._watchdog is not None and "watchdog" in state:
            self._watchdog.load_state_dict(state["watchdog"])


def _parts(sequences: int, length: int) -> int:
    """Return the number of equal parts to split a batch into, one of which is the probe."""
    wanted = min(sequences, -(-_PROBE_TOKENS // length))
    size = next(n for n in range(wanted, sequences + 1) if sequences % n == 0)
    return sequences // size
