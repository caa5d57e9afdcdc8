"""Loss by depth, in one pass over the loops."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.checks import check_count, check_number, checked
from open_mythos.data.batch import IGNORE_INDEX, Batch
from open_mythos.distributed import over_ranks
from open_mythos.errors import ConfigError
from open_mythos.evaluation.frozen import bits_per_byte, frozen, no_targets
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.layers.head import head_loss
from open_mythos.model.mythos import OpenMythos


@dataclass(frozen=True)
class DepthRow:
    """Loss at one depth, JSON-compatible through ``dataclasses.asdict``."""

    depth: int | None
    """Number of loops; None for a model without loops."""
    loss: float
    """Nats per token, averaged over tokens."""
    bits_per_byte: float | None
    """loss / bytes per token / ln 2; None when the bytes are not known."""
    tokens: int
    """Number of targets."""

    @property
    def perplexity(self) -> float:
        """Return exp(loss), infinite on overflow."""
        return math.exp(self.loss) if self.loss < 709 else math.inf


@checked
def evaluate_depths(
    model: CausalLM,
    batches: Iterable[Batch],
    depths: Sequence[int],
    *,
    bytes_per_token: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[DepthRow]:
    """Return the mean loss over ``batches`` at each depth, shallowest first.

    Equals the loss of ``model(input_ids, n_loops=depth)``, but the loops run only once, up to the
    deepest.

    Args:
        model: A looped model, or one without loops, for which a single row is returned.
        batches: Validation batches; a finite iterable, read once. In a process group the loss is
            averaged over the batches of all processes.
        depths: Numbers of loops, in any order; duplicates are ignored.
        bytes_per_token: Mean bytes of text per token, for bits per byte.
        dtype: Autocast dtype of the matmuls.

    Raises:
        ConfigError: ``depths`` is empty, or one is not a positive integer.
        DataError: The batches hold no targets.
    """
    wanted: list[int] | list[None] = [None]
    if bytes_per_token is not None:
        check_number("bytes_per_token", bytes_per_token, gt=0)
    if isinstance(model, OpenMythos):
        if not depths:
            raise ConfigError(
                "no depth to evaluate", where="depths", value=depths,
                allowed="one or more integers >= 1",
                fix="pass the depths to evaluate, e.g. [1, 4, 8]",
            )  # fmt: skip
        wanted = sorted({check_count("depths", depth) for depth in depths})
    sums, tokens = [], 0
    with frozen(model, dtype) as device:
        for batch in batches:
            tokens += int((batch.targets != IGNORE_INDEX).sum())  # before the copy to the device
            sums.append(loss_sums(model, batch.to(device), wanted))
    # read at the end: a host-device sync per batch would leave the device idle
    each_batch = torch.stack(sums).cpu().double() if sums else torch.zeros(1, len(wanted))
    losses = each_batch.sum(0).tolist()
    # the processes may have read different windows
    *totals, predicted = (sum(each) for each in over_ranks([*losses, tokens]))
    if not predicted:
        raise no_targets()
    return [
        DepthRow(depth, loss, bits_per_byte(loss, bytes_per_token), int(predicted))
        for depth, loss in zip(wanted, (total / predicted for total in totals), strict=True)
    ]


def loss_sums(model: CausalLM, batch: Batch, depths: Sequence[int | None]) -> Tensor:
    """Sum the loss over the targets of ``batch`` at each of ``depths``, in ascending order.

    ``depths`` is ``[None]`` for a model without loops. Call it inside :func:`frozen`.
    """
    states = _final_states(model, batch, depths)
    return torch.stack([
        head_loss(model.head, hidden_BTD, batch.targets, IGNORE_INDEX) for hidden_BTD in states
    ])  # fmt: skip


def _final_states(model: CausalLM, batch: Batch, depths: Sequence[int | None]) -> Iterator[Tensor]:
    """Yield the final hidden state (B, T, D) at each of ``depths``, in ascending order."""
    ctx = model.context(batch.input_ids, document_ids=batch.document_ids)
    if not isinstance(model, OpenMythos):
        yield model.hidden(batch.input_ids, ctx)
        return
    deepest = max(depth or 0 for depth in depths)
    for t, h_BTD in model.unroll(batch.input_ids, deepest, ctx):
        if t + 1 in depths:
            yield model.final_hidden(h_BTD, ctx)
