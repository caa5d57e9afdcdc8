"""Which experts fire at which loop.

Loops pay where tokens meet different experts at different loops (arXiv 2605.09165); these figures
say whether they do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from open_mythos.data.batch import Batch
from open_mythos.errors import ConfigError, DataError
from open_mythos.evaluation.frozen import frozen
from open_mythos.model.depth import Depth
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.trace import LoopTrace


@dataclass(frozen=True)
class LayerRouting:
    """The routing of one mixture layer over L loops; ``dataclasses.asdict`` makes it JSON."""

    layer: int
    """Number of the block in the model."""
    load: list[list[float]]
    """(L, E) share of the choices that each expert got at each loop; a row sums to 1."""
    entropy: list[float]
    """(L,) entropy of those shares in units of log E: 1 is even, 0 a single expert."""
    overlap: list[list[float]]
    """(L, L) share of a token's experts that two loops have in common; C / E by chance."""
    disjoint: list[float]
    """(L - 1,) share of tokens that meet no expert again from one loop to the next."""


def expert_routing(
    model: OpenMythos,
    batches: Iterable[Batch],
    n_loops: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> list[LayerRouting]:
    """The routing of every mixture layer, over all tokens of ``batches``.

    Args:
        model: A looped model with experts.
        batches: A few batches; a finite iterable, read once.
        n_loops: Loops; ``max_loop_iters`` by default.
        dtype: Of the matrix products (autocast).

    Raises:
        ConfigError: The model has no experts, or the number of loops is wrong.
        DataError: There is no batch.
    """
    if not isinstance(model, OpenMythos) or not model.cfg.n_experts:
        raise ConfigError(
            "the model routes nothing", where="model", value=type(model).__name__,
            allowed="a looped model with n_experts >= 1", fix="evaluate a model with experts",
        )  # fmt: skip
    merged = LoopTrace()
    with frozen(model, dtype) as device:
        for batch in (batch.to(device) for batch in batches):
            trace = LoopTrace(keep_routing=True)
            ctx = model.context(batch.input_ids, document_ids=batch.document_ids)
            model.hidden(batch.input_ids, ctx, Depth(n_loops), trace)
            _merge(merged, trace)
    if not merged.load:
        raise DataError(
            "nothing to evaluate on", where="batches", value="no batch",
            allowed="at least one", fix="check that the validation split is not empty",
        )  # fmt: skip
    return [_layer(merged, layer) for layer in sorted(merged.load_by_layer())]


def _merge(merged: LoopTrace, trace: LoopTrace) -> None:
    """Add the routing of one batch: loads summed, choices (N, C) one after the other."""
    for at, experts_BTC in trace.experts.items():
        load_E, experts_NC = trace.load[at].cpu(), experts_BTC.flatten(0, 1).cpu()
        first = at not in merged.load
        merged.active[at[1]] = None  # every token ran every loop
        merged.load[at] = load_E if first else merged.load[at] + load_E
        merged.experts[at] = experts_NC if first else torch.cat((merged.experts[at], experts_NC))


def _layer(merged: LoopTrace, layer: int) -> LayerRouting:
    load_LE = merged.load_by_loop(layer)
    chosen = [merged.experts[layer, loop] for loop in range(load_LE.shape[0])]
    return LayerRouting(
        layer=layer,
        load=(load_LE / load_LE.sum(-1, keepdim=True)).tolist(),
        entropy=merged.routing_entropy(layer).tolist(),
        overlap=merged.expert_overlap(layer).tolist(),
        disjoint=[_disjoint(*pair) for pair in pairwise(chosen)],
    )


def _disjoint(first_NC: Tensor, second_NC: Tensor) -> float:
    """Share of tokens whose two sets of experts have none in common."""
    same = first_NC.unsqueeze(-1) == second_NC.unsqueeze(-2)
    return float((~same.flatten(1).any(-1)).float().mean())
