"""Alarms for failures of a looped model that its training loss does not show.

The watchdog evaluates metrics of the logged steps and one cheap probe. Alarms are only logged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch

from open_mythos.config import MythosConfig
from open_mythos.data.batch import Batch
from open_mythos.evaluation import evaluate_depths
from open_mythos.model.mythos import OpenMythos
from open_mythos.train.loop_summary import LoopSummary
from open_mythos.train.state import TokenBatch

REMEDIES: dict[str, str] = {
    "not_finite": "the step was skipped; lower optim.lr or train.clip, or train in float32 "
    '(train.dtype "float32") to see whether the range of the dtype is the cause',
    "state_explosion": "lower optim.lr or train.clip; train at more depths (depth.plan "
    '"lognormal_poisson") so that late loops receive a gradient too',
    "state_collapse": 'lower optim.lr or lengthen train.warmup_steps; model.initial_state "normal" '
    "keeps tokens apart at the start",
    "recurrence_ignored": "if the task needs depth: raise depth.mean, let gradients through all "
    "loops (train.grad_loops null), or move layers from prelude and coda into the loop",
    "halting_stuck": "train the gate again with another --margin (open-mythos train gate), or use "
    "another threshold (--exit gate:0.9)",
    "one_expert": "raise train.balance_speed, or add train.balance_coefficient 1e-4",
    "uneven_experts": "raise train.balance_speed, or use fewer experts; starved experts learn "
    "nothing",
}
"""Alarm name -> what to do about it. "halting_stuck" concerns the gate, which is trained after the
model: :func:`halting_alarm`."""


@dataclass(frozen=True)
class Thresholds:
    """Bounds of a healthy run. The defaults are starting points."""

    growth: float = 10.0
    """Largest state norm over that of the first loop."""
    correlation: float = 0.85
    """Mean cosine between the states of two different tokens. Definitions that count each token
    with itself and subtract 1 / T give 0.85 (1 - 1 / T) for the same states."""
    gap: float = 0.001
    """Absolute value of :func:`relative_gap`."""
    shallow: float = 1.05
    """Mean loops under a halting gate at or below which it always stops at once."""
    deep: float = 0.99
    """Mean loops over the most loops allowed, at or above which the gate never stops."""
    takes_all: float = 0.95
    """Share of the tokens that choose the same expert; judged where an even share is at most a
    half."""
    starved: float = 0.1
    """Least share of the choices that an expert gets, times the number of experts."""
    crowded: float = 4.0
    """Largest share of the choices that an expert gets, times the number of experts."""
    patience: int = 5
    """Consecutive observations out of bounds that raise an alarm; one is enough for
    "not_finite"."""
    uneven_steps: int = 200
    """Optimizer steps for which experts must be uneven, in addition to ``patience``."""


@dataclass(frozen=True)
class Alarm:
    """A metric that is out of the bounds of a healthy run."""

    name: str
    """A key of :data:`REMEDIES`."""
    step: int
    """Optimizer steps done when it was raised."""
    loop: int | None
    """The loop it concerns, counted from 1; None if it concerns no single one."""
    value: float
    """What was measured."""
    threshold: float
    """The bound that ``value`` has crossed."""
    what: str
    """Description in one sentence."""
    fix: str
    """What to do about it."""

    def __str__(self) -> str:
        return f"{self.name} at step {self.step}: {self.what}\n  to do:   {self.fix}"


class _Finding(NamedTuple):
    """One judged metric; ``key`` is the alarm's name, with "/layerN" for an MoE layer."""

    key: str
    bad: bool
    loop: int | None
    value: float
    threshold: float
    what: str


class LoopWatchdog:
    """Judges logged steps and tracks for how long each metric has been out of bounds.

    Args:
        cfg: The model's configuration.
        thresholds: Bounds of a healthy run.
        start: Step from which "state_collapse" and "recurrence_ignored" are judged, see
            :func:`first_judged_step`: a healthy model that has only learned token frequencies
            shows both.
    """

    def __init__(
        self, cfg: MythosConfig, thresholds: Thresholds | None = None, *, start: int = 0
    ) -> None:
        self.cfg, self.thresholds = cfg, thresholds or Thresholds()
        self.start = start
        self._streaks: dict[str, tuple[int, int]] = {}
        self._active: set[str] = set()

    @property
    def active(self) -> list[str]:
        """Alarms that were raised and have not cleared: names, with the layer if there is one, as
        in "one_expert/layer1"."""
        return sorted(self._active)

    def observe(
        self, step: int, summary: LoopSummary, *, loop_gap: float | None = None
    ) -> list[Alarm]:
        """Judge the metrics of all ranks after ``step`` steps; return the alarms raised.

        An alarm is raised once until it clears. Metrics that were not measured leave earlier
        findings unchanged. ``loop_gap`` is the :func:`relative_gap`.
        """
        raised = []
        for key, bad, loop, value, threshold, what in self._judge(step, summary, loop_gap):
            if not bad:
                self._streaks.pop(key, None)
                self._active.discard(key)
                continue
            name = key.partition("/")[0]
            count, since = self._streaks.get(key, (0, step))
            self._streaks[key] = count + 1, since
            if key not in self._active and self._lasts(name, count + 1, step - since):
                self._active.add(key)
                raised.append(Alarm(name, step, loop, value, threshold, what, REMEDIES[name]))
        return raised

    def state_dict(self) -> dict[str, Any]:
        """Return streaks and active alarms, JSON-ready."""
        streaks = {name: list(streak) for name, streak in self._streaks.items()}
        return {"streaks": streaks, "active": self.active}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._streaks = {name: (count, since) for name, (count, since) in state["streaks"].items()}
        self._active = set(state["active"])

    def _lasts(self, name: str, count: int, steps: int) -> bool:
        """Return whether ``count`` observations over ``steps`` steps raise the alarm."""
        if name == "not_finite":
            return True
        enough = count >= self.thresholds.patience
        return enough and (name != "uneven_experts" or steps >= self.thresholds.uneven_steps)

    def _judge(self, step: int, summary: LoopSummary, loop_gap: float | None) -> Iterator[_Finding]:
        norms = summary.means.get("state_norm", [])
        broken = [t for t, norm in enumerate(norms) if not math.isfinite(norm)]
        if norms:
            loop = broken[0] + 1 if broken else None
            value = norms[broken[0]] if broken else 0.0
            what = f"the norm of the state is {value} after loop {loop} of {len(norms)}"
            yield _Finding("not_finite", bool(broken), loop, value, math.inf, what)
        if norms and not broken:
            yield self._explosion(norms)
            if step >= self.start and "correlation" in summary.means:
                yield self._collapse(summary, norms)
        if loop_gap is not None and not broken and step >= self.start:
            limit = self.thresholds.gap
            what = f"the loss with one loop differs by {loop_gap:+.3%} from that with mean depth"
            # a large negative gap means that loops hurt, which is not the same as no effect
            yield _Finding(
                "recurrence_ignored", not abs(loop_gap) >= limit, None, loop_gap, limit, what
            )
        for layer in summary.load:
            yield from self._experts(layer, summary)

    def _explosion(self, norms: list[float]) -> _Finding:
        # the largest norm, not the last: A damps again what one loop has amplified
        limit, first, largest = self.thresholds.growth, max(norms[0], 1e-30), max(norms)
        loop = next((t + 1 for t, norm in enumerate(norms) if norm / first > limit), None)
        ratio = largest / first
        what = (
            f"the state norm after loop {norms.index(largest) + 1} of {len(norms)} is {ratio:.3g} "
            "times that after the first"
        )
        return _Finding("state_explosion", loop is not None, loop, ratio, limit, what)

    def _collapse(self, summary: LoopSummary, norms: list[float]) -> _Finding:
        # skip loops reached by few sequences: their mean describes those sequences, not the loop
        common = sum(2 * rows >= summary.rows[0] for rows in summary.rows)
        pairs = zip(summary.means["correlation"], norms, strict=True)
        alike = [1.0 if norm == 0 else cosine for cosine, norm in pairs][:common]
        value, limit = max(alike), self.thresholds.correlation
        loop = next((t + 1 for t, cosine in enumerate(alike) if cosine >= limit), None)
        what = f"the states of different tokens have a mean cosine of {value:.3f}"
        return _Finding("state_collapse", value >= limit, loop, value, limit, what)

    def _experts(self, layer: int, summary: LoopSummary) -> Iterator[_Finding]:
        """Judge one MoE layer over all loops together: loops may prefer different experts."""
        bounds, count, chosen = self.thresholds, self.cfg.n_experts, self.cfg.n_experts_per_tok
        choices = float(summary.load[layer].sum())
        # with fewer choices chance alone starves an expert
        if not choices * bounds.starved >= count:
            return
        share_E = summary.expert_share(layer)
        top, low = max(share_E), min(share_E)
        if 2 * chosen <= count:
            tokens, limit = top * chosen, bounds.takes_all  # a token chooses an expert at most once
            what = (
                f"expert {share_E.index(top)} of layer {layer} is chosen by {tokens:.1%} of tokens"
            )
            yield _Finding(f"one_expert/layer{layer}", tokens >= limit, None, tokens, limit, what)
        starving, crowded = low * count < bounds.starved, top * count > bounds.crowded
        share, limit = (low, bounds.starved) if starving else (top, bounds.crowded)
        what = (
            f"expert {share_E.index(share)} of layer {layer} gets {share:.2%} of the choices; an "
            f"even share is {1 / count:.2%}"
        )
        bad = starving or crowded
        yield _Finding(f"uneven_experts/layer{layer}", bad, None, share * count, limit, what)


def halting_alarm(
    step: int, mean_loops: float, most: int, thresholds: Thresholds | None = None
) -> Alarm | None:
    """Return the alarm "halting_stuck" if a gate always stops at once or never stops, else None.

    The gate, trained for ``step`` steps, runs ``mean_loops`` of ``most`` loops per position.
    """
    bounds, name = thresholds or Thresholds(), "halting_stuck"
    low, high = bounds.shallow, bounds.deep * most
    if most == 1 or low < mean_loops < high:
        return None
    limit = low if mean_loops <= low else high
    what = f"positions run {mean_loops:.2f} of at most {most} loops, nearly all of them the same"
    return Alarm(name, step, None, mean_loops, limit, what, REMEDIES[name])


def first_judged_step(steps: int, warmup_steps: int) -> int:
    """Return the step by which a run should have learned more than token frequencies: after its
    warm-up and a fifth of its steps, but at most 2,000."""
    return max(warmup_steps, min(steps // 5, 2000))


def loop_losses(
    model: OpenMythos, batch: TokenBatch, depth: int, *, dtype: torch.dtype = torch.float32
) -> tuple[float, float]:
    """Return the loss in nats per token with one loop and with ``depth``, from one forward pass.

    Costs about a third of a training step on the same batch; a few sequences are enough, because
    both losses are measured on the same tokens. ``dtype`` is the autocast dtype of the matmuls.

    Raises:
        DataError: The batch has no target.
    """
    one, deep = evaluate_depths(model, [cast(Batch, batch)], [1, depth], dtype=dtype)
    return one.loss, deep.loss


def relative_gap(one: float, deep: float) -> float:
    """Return the gain from looping: (loss with one loop - loss with many) / loss with many."""
    return (one - deep) / max(abs(deep), 1e-12)
