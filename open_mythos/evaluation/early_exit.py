"""What an exit rule saves and what it costs: adaptive depth beside fixed depths and a control.

The rule runs for real: positions that left are not computed. The control deals the rule's own
exits to random positions, so it computes as many loops; what the rule gains over it is what it
knows about single positions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.checks import check_count
from open_mythos.data.batch import IGNORE_INDEX, Batch
from open_mythos.errors import ConfigError, DataError
from open_mythos.evaluation.frozen import frozen
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.depth import Depth
from open_mythos.model.exit_rules import ExitRule, Look, Memory
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.trace import LoopTrace
from open_mythos.ops.cross_entropy import chunk_rows
from open_mythos.seeding import seeded_generator


@dataclass(frozen=True)
class ExitRow:
    """One way to choose the depth; ``dataclasses.asdict`` makes it JSON."""

    name: str
    """What decides."""
    mean_loops: float
    """Loops per position."""
    loss: float
    """Nats per token, every token weighing the same."""
    bits_per_byte: float | None
    """loss / bytes per token / ln 2; None when the bytes are not known."""
    accuracy: float
    """Share of the targets that are the most likely token."""
    computed: float
    """Positions that passed through the looped block, padding included, as a share of full depth.
    Rows that keep fewer positions than others are padded, so it is a little more than
    ``mean_loops`` over the loops of full depth."""
    seconds: float | None = None
    """Median wall clock of all batches, prelude and coda included; None when not timed."""


@dataclass(frozen=True)
class ExitReport:
    """Adaptive depth beside what it has to beat."""

    n_loops: int
    """Most loops."""
    tokens: int
    """Targets."""
    histogram: list[int]
    """Positions that ran 1, 2, ... ``n_loops`` loops under the rule."""
    adaptive: ExitRow
    """The rule."""
    random: ExitRow
    """The same exits, dealt to random positions."""
    mean_depth: ExitRow
    """Every position at the rule's mean loops, rounded up."""
    full: ExitRow
    """Every position at ``n_loops``."""

    @property
    def rows(self) -> list[ExitRow]:
        """All four."""
        return [self.adaptive, self.random, self.mean_depth, self.full]


@dataclass(frozen=True)
class GivenDepths:
    """An exit rule that was told every position's loops: for controls and replays.

    The call it is used in must be of the shape (B, T) of the depths.
    """

    depths_BT: Tensor

    def __call__(self, look: Look, memory: Memory | None) -> tuple[Tensor, Memory]:
        """See :class:`ExitRule`; remembers the depths of the positions still running."""
        depths_BT = self.depths_BT if memory is None else memory[0]
        return look.t + 1 >= depths_BT, (depths_BT,)


@dataclass(frozen=True)
class Pass:
    """What came of one pass over all batches."""

    losses_N: Tensor
    """(N,) loss of every target."""
    right_N: Tensor
    """(N,) whether the target was the most likely token."""
    exits: list[Tensor]
    """(B, T) loops that each position ran, one tensor for each batch."""
    computed: int
    """Positions that passed through the looped block, over all loops, padding included."""


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
    """Quality and computation under ``rule``, beside two fixed depths and random exits.

    Args:
        model: A looped model.
        batches: Validation batches; a finite iterable, read once and kept. Rows without a target
            are left out.
        rule: Decides for every position.
        n_loops: Most loops; ``max_loop_iters`` by default.
        bytes_per_token: Bytes of text that a token stands for on average, for bits per byte.
        dtype: Of the matrix products (autocast); float32 is exact.
        seed: Of the random exits.
        repeats: Passes by which each variant is timed, in turns; 0 times nothing.

    Raises:
        ConfigError: The model has no loops, or a number is out of range.
        DataError: The batches hold nothing to predict.
    """
    if not isinstance(model, OpenMythos):
        raise ConfigError(
            "the model has no loops to leave", where="model", value=type(model).__name__,
            allowed="a looped model", fix="measure a dense model with evaluate_depths",
        )  # fmt: skip
    check_count("repeats", repeats, least=0)
    depth = model.cfg.max_loop_iters if n_loops is None else check_count("n_loops", n_loops)
    with frozen(model, dtype) as device:
        kept = [part for batch in batches if len(part := _with_targets(batch.to(device)))]
        if not kept:
            raise DataError(
                "nothing to evaluate on", where="batches", value="0 tokens to predict",
                allowed="at least one target", fix="check that the validation split is not empty",
            )  # fmt: skip
        adaptive = run_exits(model, kept, depth, [rule] * len(kept))
        dealt = [GivenDepths(exits) for exits in deal(adaptive.exits, seed)]
        mean_depth = math.ceil(_mean_loops(adaptive))
        names = ("exit rule", "random exits", f"{mean_depth} loops", f"{depth} loops")
        every: list[ExitRule | None] = [None] * len(kept)
        variants: list[Variant] = [
            (depth, [rule] * len(kept)), (depth, dealt), (mean_depth, every), (depth, every),
        ]  # fmt: skip
        passes = [adaptive, *(run_exits(model, kept, *variant) for variant in variants[1:])]
        seconds = wall_clock(model, kept, variants, repeats) if repeats else [None] * len(names)
    everything = depth * sum(batch.targets.numel() for batch in kept)
    rows = [
        _row(name, done, everything, bytes_per_token, taken)
        for name, done, taken in zip(names, passes, seconds, strict=True)
    ]
    loops_N = torch.cat([exits.flatten() for exits in adaptive.exits])
    histogram = loops_N.bincount(minlength=depth + 1)[1:].tolist()
    return ExitReport(depth, len(adaptive.losses_N), histogram, *rows)


def run_exits(
    model: OpenMythos, batches: Sequence[Batch], n_loops: int, rules: Sequence[ExitRule | None]
) -> Pass:
    """One pass, with a rule for each batch (None: all loops); the caller sets the conditions."""
    losses, right, exits, computed = [], [], [], 0
    for batch, rule in zip(batches, rules, strict=True):
        trace = LoopTrace()
        hidden_BTD = _hidden(model, batch, n_loops, rule, trace)
        asked_BT = batch.targets != IGNORE_INDEX
        loss_N, right_N = token_scores(hidden_BTD[asked_BT], model.head, batch.targets[asked_BT])
        losses.append(loss_N.cpu())
        right.append(right_N.cpu())
        ran_BT = torch.full_like(batch.targets, n_loops) if trace.exits is None else trace.exits
        exits.append(ran_BT.cpu())
        computed += sum(_positions(trace, t, batch) for t in range(trace.n_loops))
    return Pass(torch.cat(losses), torch.cat(right), exits, computed)


Variant = tuple[int, Sequence[ExitRule | None]]
"""Most loops, and a rule for each batch (None: all loops)."""


def wall_clock(
    model: OpenMythos, batches: Sequence[Batch], variants: Sequence[Variant], repeats: int
) -> list[float]:
    """Median seconds of each variant over all batches, head not included.

    They are run in turns, so that a slow spell of the machine hits all.
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
    hidden_ND: Tensor, head: nn.Linear, targets_N: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Loss (N,) in nats of every target, and whether it is the most likely token.

    The logits of ``chunk`` positions exist at a time, by default of
    :func:`open_mythos.ops.cross_entropy.chunk_rows`; there is no gradient.
    """
    losses, right = [], []
    if chunk is None:
        vocab, device = head.out_features, targets_N.device
        chunk = chunk_rows(len(targets_N), vocab, torch.float32, device)
    with torch.no_grad():
        for rows_ND, rows_N in zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True):
            logits_NV = head(rows_ND).float()
            losses.append(F.cross_entropy(logits_NV, rows_N, reduction="none"))
            right.append(logits_NV.argmax(-1) == rows_N)
    return torch.cat(losses), torch.cat(right)


def deal(exits: Sequence[Tensor], seed: int) -> list[Tensor]:
    """The same exits in the same shapes, at random positions; a function of ``seed``."""
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


def _positions(trace: LoopTrace, t: int, batch: Batch) -> int:
    """Positions that loop ``t`` computed, padding included."""
    active = trace.active[t]
    return batch.targets.numel() if active is None else active.take(batch.targets).numel()


def _with_targets(batch: Batch) -> Batch:
    """The rows that have something to predict."""
    keep_B = (batch.targets != IGNORE_INDEX).any(1)
    if keep_B.all():
        return batch
    return replace(
        batch,
        input_ids=batch.input_ids[keep_B],
        targets=batch.targets[keep_B],
        document_ids=None if batch.document_ids is None else batch.document_ids[keep_B],
        sample_index=batch.sample_index[keep_B],
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _mean_loops(done: Pass) -> float:
    return float(torch.cat([exits.flatten() for exits in done.exits]).double().mean())


def _row(
    name: str, done: Pass, everything: int, bytes_per_token: float | None, seconds: float | None
) -> ExitRow:
    loss = float(done.losses_N.double().mean())
    bits = None if bytes_per_token is None else loss / bytes_per_token / math.log(2)
    return ExitRow(
        name, _mean_loops(done), loss, bits, float(done.right_N.double().mean()),
        done.computed / everything, seconds,
    )  # fmt: skip
