"""Loss against depth: one pass over the loops, read out wherever a depth was asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.checks import check_count
from open_mythos.data.batch import IGNORE_INDEX, Batch
from open_mythos.distributed import over_ranks
from open_mythos.errors import ConfigError, DataError
from open_mythos.evaluation.frozen import frozen
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.mythos import OpenMythos
from open_mythos.ops.cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class DepthRow:
    """The loss at one depth; ``dataclasses.asdict`` makes it JSON."""

    depth: int | None
    """Loops; None for a model that has none."""
    loss: float
    """Nats per token, every token weighing the same."""
    bits_per_byte: float | None
    """loss / bytes per token / ln 2; None when the bytes are not known."""
    tokens: int
    """Tokens predicted."""

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 709 else math.inf


def evaluate_depths(
    model: CausalLM,
    batches: Iterable[Batch],
    depths: Sequence[int],
    *,
    bytes_per_token: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[DepthRow]:
    """The mean loss over ``batches`` at each depth, shallowest first.

    The figures are those of ``model(input_ids, n_loops=depth)`` for every depth, but the loops are
    run once, up to the deepest.

    Args:
        model: A looped model, or one without loops, which gives a single row.
        batches: Validation batches; a finite iterable, read once. In a process group the figures
            are over the batches of all processes.
        depths: Loops, in any order; repetitions count once.
        bytes_per_token: Bytes of text that a token stands for on average, for bits per byte.
        dtype: Of the matrix products (autocast); float32 is exact.

    Raises:
        ConfigError: No depth was given, or one is not a positive integer.
        DataError: The batches hold nothing to predict.
    """
    wanted = _wanted(model, depths)
    sums, tokens = [], 0
    with frozen(model, dtype) as device:
        for batch in batches:
            tokens += int((batch.targets != IGNORE_INDEX).sum())  # where the batch still is
            sums.append(loss_sums(model, batch.to(device), wanted))
    # read at the end: the device would have nothing to do while the host read a loss
    each_batch = torch.stack(sums).cpu().double() if sums else torch.zeros(1, len(wanted))
    losses = each_batch.sum(0).tolist()
    # each process may have read windows of its own
    *totals, predicted = (sum(each) for each in over_ranks([*losses, tokens]))
    if not predicted:
        raise DataError(
            "nothing to evaluate on", where="batches", value="0 tokens to predict",
            allowed="at least one target", fix="check that the validation split is not empty",
        )  # fmt: skip
    return [
        _row(depth, total / predicted, bytes_per_token, int(predicted))
        for depth, total in zip(wanted, totals, strict=True)
    ]


def loss_sums(model: CausalLM, batch: Batch, depths: Sequence[int | None]) -> Tensor:
    """The loss summed over the targets of ``batch``, at each of ``depths``, which ascend; float32.

    Depths are numbers of loops, or a single None for a model without loops. The caller sets the
    conditions.
    """
    return torch.stack([
        linear_cross_entropy(
            hidden_BTD, model.head.weight, batch.targets,
            ignore_index=IGNORE_INDEX, reduction="sum", scale=model.head.scale,
            softcap=model.head.softcap,
        )
        for hidden_BTD in _final_states(model, batch, depths)
    ])  # fmt: skip


def _wanted(model: CausalLM, depths: Sequence[int]) -> list[int] | list[None]:
    if not isinstance(model, OpenMythos):
        return [None]
    if not depths:
        raise ConfigError(
            "no depth to evaluate", where="depths", value=depths,
            allowed="one or more integers >= 1", fix="name the loops to measure at, e.g. [1, 4, 8]",
        )  # fmt: skip
    return sorted({check_count("depths", depth) for depth in depths})


def _final_states(model: CausalLM, batch: Batch, depths: Sequence[int | None]) -> Iterator[Tensor]:
    """The normalised final hidden state (B, T, D) at each of ``depths``, which ascend."""
    ctx = model.context(batch.input_ids, document_ids=batch.document_ids)
    if not isinstance(model, OpenMythos):
        yield model.hidden(batch.input_ids, ctx)
        return
    deepest = max(depth or 0 for depth in depths)
    for t, h_BTD in model.unroll(batch.input_ids, deepest, ctx):
        if t + 1 in depths:
            yield model.final_hidden(h_BTD, ctx)


def _row(depth: int | None, loss: float, bytes_per_token: float | None, tokens: int) -> DepthRow:
    bits = None if bytes_per_token is None else loss / bytes_per_token / math.log(2)
    return DepthRow(depth, loss, bits, tokens)
