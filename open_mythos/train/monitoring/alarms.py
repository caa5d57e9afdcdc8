"""Ways in which a looped model goes wrong while its loss still looks harmless, by name.

The watchdog looks at what the logged steps measured anyway, and at one cheap probe. It decides
nothing: an :class:`Alarm` is logged and shown, once until it clears.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch

from open_mythos.config import MythosConfig
from open_mythos.data.batch import Batch
from open_mythos.evaluation import evaluate_depths
from open_mythos.model.mythos import OpenMythos
from open_mythos.train.loop_summary import LoopSummary
from open_mythos.train.state import TokenBatch

REMEDIES: dict[str, str] = {
    "not_finite": "the step was skipped; lower optim.lr or train.clip, or compute in float32 "
    '(train.dtype "float32") to see whether it is the range of the dtype',
    "state_explosion": "lower optim.lr or train.clip; train at more depths (depth.plan "
    '"lognormal_poisson") so that late loops have a gradient too',
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
"""Name of every alarm -> what to do about it. "halting_stuck" is about a gate, which is trained
after the model: :func:`halting_alarm`."""


@dataclass(frozen=True)
class Thresholds:
    """Bounds of a healthy run. Defaults are starting points."""

    growth: float = 10.0
    """Norm of the longest state over that of the first."""
    correlation: float = 0.85
    """Mean cosine between two tokens' states. Counting each token with itself and subtracting
    1 / T, as others do, gives 0.85 (1 - 1 / T) for the same states."""
    gap: float = 0.001
    """(loss with 1 loop - loss with the mean number) over the latter, whatever its sign."""
    shallow: float = 1.05
    """Mean loops of positions under a halting gate: at or below this it always stops at once."""
    deep: float = 0.99
    """The same over the most loops allowed: at or above this it never stops."""
    takes_all: float = 0.95
    """Share of the tokens that choose one and the same expert, judged where an even share is at
    most a half."""
    starved: float = 0.1
    """Share of the choices that an expert gets, times the number of experts."""
    crowded: float = 4.0
    """The same, too much."""
    patience: int = 5
    """Consecutive looks at which a number is out of bounds; one is enough for "not_finite"."""
    uneven_steps: int = 200
    """Optimizer steps for which experts are uneven, beside ``patience``."""


@dataclass(frozen=True)
class Alarm:
    """A number that has left the bounds of a healthy run."""

    name: str
    """A key of :data:`REMEDIES`."""
    step: int
    """Optimizer steps done when it was raised."""
    loop: int | None
    """The loop it concerns, counted from 1; None where it concerns no single one."""
    value: float
    """What was measured."""
    threshold: float
    """The bound that ``value`` has crossed."""
    what: str
    """One sentence: what was seen."""
    fix: str
    """What to do about it."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, JSON-ready except that ``value`` may be NaN or infinite."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.name} at step {self.step}: {self.what}\n  to do:   {self.fix}"


@dataclass(frozen=True)
class _Finding:
    """One number, judged."""

    name: str
    bad: bool
    value: float
    threshold: float
    what: str
    loop: int | None = None
    layer: int | None = None

    @property
    def key(self) -> str:
        """Key under which looks are counted: layers are judged one by one."""
        return self.name if self.layer is None else f"{self.name}/layer{self.layer}"


class LoopWatchdog:
    """Judges logged steps and remembers which numbers have been out of bounds, and for how long.

    Args:
        cfg: The model's configuration.
        thresholds: Bounds of a healthy run.
        start: Step from which "state_collapse" and "recurrence_ignored" are judged; see
            :func:`first_judged_step`. A model that has only learnt which tokens are frequent shows
            both and is healthy.
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
        """Alarms that have been raised and have not cleared: their names, and where it concerns
        one the layer, as in "one_expert/layer1"."""
        return sorted(self._active)

    def observe(
        self, step: int, summary: LoopSummary, *, loop_gap: float | None = None
    ) -> list[Alarm]:
        """Look at one step and return the alarms that it raises, each once until it clears.

        What is not measured is not judged, and leaves earlier findings as they are.

        Args:
            step: Optimizer steps done.
            summary: What the loops did, over all ranks; with the token correlation if
                "state_collapse" is to be found.
            loop_gap: :func:`relative_gap`, if it was measured.
        """
        raised = []
        for found in self._look(step, summary, loop_gap):
            if not found.bad:
                self._streaks.pop(found.key, None)
                self._active.discard(found.key)
                continue
            count, since = self._streaks.get(found.key, (0, step))
            self._streaks[found.key] = count + 1, since
            if found.key not in self._active and self._lasts(found.name, count + 1, step - since):
                self._active.add(found.key)
                raised.append(
                    Alarm(
                        found.name, step, found.loop, found.value, found.threshold, found.what,
                        REMEDIES[found.name],
                    )
                )  # fmt: skip
        return raised

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen up to now, JSON-ready."""
        return {
            "streaks": {name: list(streak) for name, streak in self._streaks.items()},
            "active": self.active,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._streaks = {
            name: (int(n), int(since)) for name, (n, since) in state["streaks"].items()
        }
        self._active = set(state["active"])

    def _lasts(self, name: str, count: int, steps: int) -> bool:
        """Return whether ``count`` looks over ``steps`` steps are enough."""
        if name == "not_finite":
            return True
        enough = count >= self.thresholds.patience
        return enough and (name != "uneven_experts" or steps >= self.thresholds.uneven_steps)

    def _look(self, step: int, summary: LoopSummary, loop_gap: float | None) -> Iterator[_Finding]:
        norms = summary.means.get("state_norm", [])
        broken = [t for t, norm in enumerate(norms) if not math.isfinite(norm)]
        if norms:
            yield self._not_finite(norms, broken)
        if norms and not broken:
            yield self._explosion(norms)
            if step >= self.start and "correlation" in summary.means:
                yield self._collapse(summary, norms)
        if loop_gap is not None and not broken and step >= self.start:
            yield self._ignored(loop_gap)
        for layer in summary.load:
            yield from self._experts(layer, summary)

    def _not_finite(self, norms: list[float], broken: list[int]) -> _Finding:
        loop = broken[0] + 1 if broken else None
        value = norms[broken[0]] if broken else 0.0
        what = f"the norm of the state is {value} after loop {loop} of {len(norms)}"
        return _Finding("not_finite", bool(broken), value, math.inf, what, loop)

    def _explosion(self, norms: list[float]) -> _Finding:
        # the longest, not the last: A shrinks again what one loop has blown up
        limit, first, longest = self.thresholds.growth, max(norms[0], 1e-30), max(norms)
        loop = next((t + 1 for t, norm in enumerate(norms) if norm / first > limit), None)
        what = (
            f"after loop {norms.index(longest) + 1} of {len(norms)} the state is "
            f"{longest / first:.3g} times as long as after the first"
        )
        return _Finding("state_explosion", loop is not None, longest / first, limit, what, loop)

    def _collapse(self, summary: LoopSummary, norms: list[float]) -> _Finding:
        # loops that few sequences reach say more about these sequences than about the loop
        common = sum(2 * rows >= summary.rows[0] for rows in summary.rows)
        alike = [
            1.0 if norm == 0 else c
            for c, norm in zip(summary.means["correlation"], norms, strict=True)
        ]
        value, limit = max(alike[:common]), self.thresholds.correlation
        loop = next((t + 1 for t, c in enumerate(alike[:common]) if c >= limit), None)
        what = f"the states of different tokens have a mean cosine of {value:.3f}"
        return _Finding("state_collapse", value >= limit, value, limit, what, loop)

    def _ignored(self, gap: float) -> _Finding:
        limit = self.thresholds.gap
        what = f"the loss with one loop is {gap:+.3%} from that with the mean number of loops"
        # a large negative gap means that loops do harm, which is not the same as doing nothing
        return _Finding("recurrence_ignored", not abs(gap) >= limit, gap, limit, what)

    def _experts(self, layer: int, summary: LoopSummary) -> Iterator[_Finding]:
        """One mixture layer, all loops together: single loops may want different experts."""
        bounds, count, chosen = self.thresholds, self.cfg.n_experts, self.cfg.n_experts_per_tok
        choices = float(summary.load[layer].sum())
        # with fewer choices chance alone starves an expert
        if not choices * bounds.starved >= count:
            return
        share_E = summary.expert_share(layer)
        top, low = max(share_E), min(share_E)
        # a token chooses an expert at most once
        tokens = top * chosen
        what = f"expert {share_E.index(top)} of layer {layer} is chosen by {tokens:.1%} of tokens"
        if 2 * chosen <= count:
            bad = tokens >= bounds.takes_all
            yield _Finding("one_expert", bad, tokens, bounds.takes_all, what, layer=layer)
        starving, crowded = low * count < bounds.starved, top * count > bounds.crowded
        share, limit = (low, bounds.starved) if starving else (top, bounds.crowded)
        what = (
            f"expert {share_E.index(share)} of layer {layer} gets {share:.2%} of the choices, and "
            f"an even share is {1 / count:.2%}"
        )
        bad = starving or crowded
        yield _Finding("uneven_experts", bad, share * count, limit, what, layer=layer)


def halting_alarm(
    step: int, mean_loops: float, most: int, thresholds: Thresholds | None = None
) -> Alarm | None:
    """Return the alarm "halting_stuck" if a gate stops always, or never; else None.

    Args:
        step: Steps that the gate was trained for.
        mean_loops: Mean over positions of the loops that they run under the gate.
        most: Loops that it allows; nothing can be said of one.
        thresholds: ``shallow`` and ``deep`` bound ``mean_loops``.
    """
    bounds = thresholds or Thresholds()
    low, high = bounds.shallow, bounds.deep * most
    if most == 1 or low < mean_loops < high:
        return None
    what = f"positions run {mean_loops:.2f} of at most {most} loops, nearly all of them the same"
    return Alarm(
        "halting_stuck", step, None, mean_loops, low if mean_loops <= low else high, what,
        REMEDIES["halting_stuck"],
    )  # fmt: skip


def first_judged_step(steps: int, warmup_steps: int) -> int:
    """Return the step by which a run should have learnt more than the frequency of tokens: after
    its warm-up and a fifth of its steps, but at most 2,000."""
    return max(warmup_steps, min(steps // 5, 2000))


def loop_losses(
    model: OpenMythos, batch: TokenBatch, depth: int, *, dtype: torch.dtype = torch.float32
) -> tuple[float, float]:
    """Return the loss in nats per token with one loop and with ``depth``, from one forward pass.

    Costs about a third of a training step on the same batch; a few sequences are enough, because
    both losses are of the same tokens.

    Args:
        model: Left as it is.
        batch: Some training sequences, on any device.
        depth: Mean depth of the training, at least 2.
        dtype: Of the matmuls (autocast).

    Raises:
        DataError: The batch has no target.
    """
    one, deep = evaluate_depths(model, [cast(Batch, batch)], [1, depth], dtype=dtype)
    return one.loss, deep.loss


def relative_gap(one: float, deep: float) -> float:
    """Return (loss with one loop - loss with many) / loss with many: what looping is worth."""
    return (one - deep) / max(abs(deep), 1e-12)
