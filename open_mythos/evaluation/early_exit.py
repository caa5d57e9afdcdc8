"""Early exit: quality and computation of an exit rule against fixed depths and a random control.

The rule runs for real: exited positions are not computed. The control permutes the rule's own exit
depths across positions, so it computes the same number of loops; the difference to the rule is the
value of choosing the depth per position.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.checks import check_count, check_number, checked
from open_mythos.data.batch import IGNORE_INDEX, Batch
from open_mythos.errors import ConfigError
from open_mythos.evaluation.frozen import bits_per_byte, frozen, no_targets
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.depth import Depth
from open_mythos.model.exit_rules import ExitRule, Look, Memory
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.trace import LoopTrace
from open_mythos.ops.cross_entropy import chunk_rows
from open_mythos.seeding import seeded_generator


@dataclass(frozen=True)
class ExitRow:
    """Results of one depth policy, JSON-compatible through ``dataclasses.asdict``."""

    name: str
    """The policy."""
    mean_loops: float
    """Mean loops per position."""
    loss: float
    """Nats per token, averaged over tokens."""
    bits_per_byte: float | None
    """loss / bytes per token / ln 2; None when the bytes are not known."""
    accuracy: float
    """Fraction of targets that are the most likely token."""
    computed: float
    """Positions computed in the looped block over those at full depth. Includes padding of rows
    with fewer active positions, so it slightly exceeds ``mean_loops`` / ``n_loops``."""
    seconds: float | None = None
    """Median wall-clock time of all batches, prelude and coda included; None when not timed."""


@dataclass(frozen=True)
class ExitReport:
    """An exit rule and its baselines."""

    n_loops: int
    """Maximum number of loops."""
    tokens: int
    """Number of targets."""
    histogram: list[int]
    """Positions that exited after 1, 2, ... ``n_loops`` loops."""
    adaptive: ExitRow
    """The exit rule."""
    random: ExitRow
    """The rule's exit depths, permuted across positions."""
    mean_depth: ExitRow
    """All positions at the rule's mean depth, rounded up."""
    full: ExitRow
    """All positions at ``n_loops``."""

    @property
    def rows(self) -> list[ExitRow]:
        """All four policies."""
        return [self.adaptive, self.random, self.mean_depth, self.full]


@dataclass(frozen=True)
class GivenDepths:
    """An exit rule with a given depth for every position (B, T) of the call."""

    depths_BT: Tensor

    def __call__(self, look: Look, memory: Memory | None) -> tuple[Tensor, Memory]:
        """Apply the rule; remembers the depths of the active positions."""
        depths_BT = self.depths_BT if memory is None else memory[0]
        return look.t + 1 >= depths_BT, (depths_BT,)


@dataclass(frozen=True)
class Pass:
    """Results of one pass over all batches."""

    losses_N: Tensor
    """(N,) loss of every target."""
    right_N: Tensor
    """(N,) whether the target was the most likely token."""
    exits: list[Tensor]
    """(B, T) loops of each position, one tensor per batch."""
    computed: int
    """Positions computed in the looped block, summed over loops, padding included."""

    @property
    def mean_loops(self) -> float:
        """Mean loops per position."""
        return float(torch.cat([exits.flatten() for exits in self.exits]).double().mean())


@checked
def evaluate_exits(
    model: CausalLM,
    batches: Iterable[Batch],
    rule: ExitRule,
    n_loops: int | None = None,
    *,
    bytes_per_token: float | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    repeats: int = 0,
) -> ExitReport:
    """Evaluate ``rule`` against two fixed depths and random exits.

    Args:
        model: A looped model.
        batches: Validation batches; a finite iterable, read once and kept in memory. Rows without
            targets are skipped.
        rule: The exit rule.
        n_loops: Maximum number of loops; ``max_loop_iters``, or a fixed depth, by default.
        bytes_per_token: Mean bytes of text per token, for bits per byte.
        dtype: Autocast dtype of the matmuls.
        seed: Seed of the random exits.
        repeats: Number of timed, interleaved passes per policy; 0 disables timing.

    Raises:
        ConfigError: The model has no loops, or a number is out of range.
        DataError: The batches hold no targets.
    """
    if not isinstance(model, OpenMythos):
        raise ConfigError(
            "early exit needs a looped model", where="model", value=type(model).__name__,
            allowed="a looped model", fix="measure a dense model with evaluate_depths",
        )  # fmt: skip
    check_count("repeats", repeats, least=0)
    if bytes_per_token is not None:
        check_number("bytes_per_token", bytes_per_token, gt=0)
    given = None if n_loops is None else check_count("n_loops", n_loops)
    depth = Depth(given, rule).most(model.cfg.max_loop_iters)
    with frozen(model, dtype) as device:
        kept = [part for batch in batches if len(part := _with_targets(batch.to(device)))]
        if not kept:
            raise no_targets()
        adaptive = run_exits(model, kept, depth, [rule] * len(kept))
        shuffled = [GivenDepths(exits) for exits in deal(adaptive.exits, seed)]
        mean_depth = math.ceil(adaptive.mean_loops)
        names = ("exit rule", "random exits", f"{mean_depth} loops", f"{depth} loops")
        fixed: list[ExitRule | None] = [None] * len(kept)
        variants: list[Variant] = [
            (depth, [rule] * len(kept)), (depth, shuffled), (mean_depth, fixed), (depth, fixed),
        ]  # fmt: skip
        passes = [adaptive, *(run_exits(model, kept, *variant) for variant in variants[1:])]
        seconds = wall_clock(model, kept, variants, repeats) if repeats else [None] * len(names)
    full = depth * sum(batch.targets.numel() for batch in kept)
    rows = []
    for name, done, taken in zip(names, passes, seconds, strict=True):
        loss, accuracy = (float(x_N.double().mean()) for x_N in (done.losses_N, done.right_N))
        bits, computed = bits_per_byte(loss, bytes_per_token), done.computed / full
        rows.append(ExitRow(name, done.mean_loops, loss, bits, accuracy, computed, taken))
    loops_N = torch.cat([exits.flatten() for exits in adaptive.exits])
    histogram = loops_N.bincount(minlength=depth + 1)[1:].tolist()
    return ExitReport(depth, len(adaptive.losses_N), histogram, *rows)


def run_exits(
    model: OpenMythos, batches: Sequence[Batch], n_loops: int, rules: Sequence[ExitRule | None]
) -> Pass:
    """Run one pass with a rule per batch (None: all loops), inside :func:`frozen`."""
    losses, right, exits, computed = [], [], [], 0
    for batch, rule in zip(batches, rules, strict=True):
        trace = LoopTrace()
        hidden_BTD = _hidden(model, batch, n_loops, rule, trace)
        target_BT = batch.targets != IGNORE_INDEX
        loss_N, right_N = token_scores(hidden_BTD[target_BT], model.head, batch.targets[target_BT])
        losses.append(loss_N.cpu())
        right.append(right_N.cpu())
        full_BT = torch.full_like(batch.targets, n_loops)
        exits.append((full_BT if trace.exits is None else trace.exits).cpu())
        for active in trace.active.values():
            ran_BT = batch.targets if active is None else active.take(batch.targets)
            computed += ran_BT.numel()
    return Pass(torch.cat(losses), torch.cat(right), exits, computed)


Variant = tuple[int, Sequence[ExitRule | None]]
"""Maximum number of loops, and a rule per batch (None: all loops)."""


def wall_clock(
    model: OpenMythos, batches: Sequence[Batch], variants: Sequence[Variant], repeats: int
) -> list[float]:
    """Measure the median seconds of each variant over all batches, excluding the head.

    Variants are interleaved, so that background load affects all of them.
    """
    taken: list[list[float]] = [[] for _ in variants]
    for _ in range(repeats):
        for seconds, (n_loops, rules) in zip(taken, variants, strict=True):
            start = _now(batches[0].targets.device)
            for batch, rule in zip(batches, rules, strict=True):
                _hidden(model, batch, n_loops, rule, None)
            seconds.append(_now(batches[0].targets.device) - start)
    return [median(seconds) for seconds in taken]


def token_scores(
    hidden_ND: Tensor, head: nn.Module, targets_N: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the loss (N,) in nats of every target, and whether it is the most likely token.

    Logits are computed without gradient for ``chunk`` positions at a time, by default
    :func:`open_mythos.ops.cross_entropy.chunk_rows`.
    """
    losses, right = [], []
    with torch.no_grad():
        vocab = head(hidden_ND[:1]).shape[-1]
        chunk = chunk or chunk_rows(len(targets_N), vocab, torch.float32, targets_N.device)
        for rows_ND, rows_N in zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True):
            logits_NV = head(rows_ND).float()
            losses.append(F.cross_entropy(logits_NV, rows_N, reduction="none"))
            right.append(logits_NV.argmax(-1) == rows_N)
    return torch.cat(losses), torch.cat(right)


def deal(exits: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Permute the exit depths across all positions; a function of ``seed``."""
    loops_N = torch.cat([each.flatten() for each in exits])
    order_N = torch.randperm(len(loops_N), generator=seeded_generator(seed, "random exits"))
    parts = loops_N[order_N].split([each.numel() for each in exits])
    return [part.view(each.shape) for part, each in zip(parts, exits, strict=True)]


def _hidden(
    model: OpenMythos, batch: Batch, n_loops: int, rule: ExitRule | None, trace: LoopTrace | None
) -> Tensor:
    if isinstance(rule, GivenDepths):
        rule = GivenDepths(rule.depths_BT.to(batch.targets.device))
    ctx = model.context(batch.input_ids, document_ids=batch.document_ids)
    return model.hidden(batch.input_ids, ctx, Depth(n_loops, rule), trace)


def _with_targets(batch: Batch) -> Batch:
    """Select the rows with targets."""
    keep_B = (batch.targets != IGNORE_INDEX).any(1)
    return batch.map(lambda x_B: x_B[keep_B])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
