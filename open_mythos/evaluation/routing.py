"""Expert routing, loop by loop.

Looped mixtures outperform a single pass where tokens use different experts at different loops
(arXiv 2605.09165); these metrics measure whether they do.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from open_mythos.checks import checked
from open_mythos.data.batch import Batch
from open_mythos.errors import ConfigError
from open_mythos.evaluation.frozen import frozen, no_targets
from open_mythos.model.depth import Depth
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.trace import LoopTrace


@dataclass(frozen=True)
class LayerRouting:
    """Routing of one mixture layer over L loops, JSON-compatible through ``dataclasses.asdict``."""

    layer: int
    """Index of the block in the model."""
    load: list[list[float]]
    """(L, E) share of the routing choices per expert; each row sums to 1."""
    entropy: list[float]
    """(L,) entropy of the load over log E: 1 is even, 0 a single expert."""
    divergence: list[list[float]]
    """(L, L) Jensen-Shannon divergence between the loads of two loops in bits: 0 equal, 1 disjoint.
    Tokens that swap experts with one another leave it at 0."""
    overlap: list[list[float]]
    """(L, L) fraction of a token's experts shared by two loops; C / E by chance."""
    disjoint: list[list[float]]
    """(L, L) fraction of tokens with no expert in common between two loops."""
    information: float
    """Mutual information between loop and expert in bits, at most log2 of the smaller count."""
    chance: float
    """Expected mutual information of independent choices, from the finite sample alone:
    (L - 1)(E - 1) / (2 choices ln 2) bits (Miller and Madow, 1955)."""


@checked
def expert_routing(
    model: OpenMythos,
    batches: Iterable[Batch],
    n_loops: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> list[LayerRouting]:
    """Measure the routing of every mixture layer over all tokens of ``batches``.

    Args:
        model: A looped model with experts.
        batches: A finite iterable, read once; a few batches suffice.
        n_loops: Number of loops; ``max_loop_iters`` by default.
        dtype: Autocast dtype of the matmuls.

    Raises:
        ConfigError: The model has no experts, or ``n_loops`` is out of range.
        DataError: ``batches`` is empty.
    """
    if not isinstance(model, OpenMythos) or not model.cfg.n_experts:
        raise ConfigError(
            "the model has no experts", where="model", value=type(model).__name__,
            allowed="a looped model with n_experts >= 1", fix="evaluate a model with experts",
        )  # fmt: skip
    merged, experts = LoopTrace(), defaultdict[tuple[int, int], list[Tensor]](list)
    with frozen(model, dtype) as device:
        for batch in (batch.to(device) for batch in batches):
            trace = LoopTrace(keep_routing=True)
            ctx = model.context(batch.input_ids, document_ids=batch.document_ids)
            model.hidden(batch.input_ids, ctx, Depth(n_loops), trace)
            merged.add(trace)
            for at, experts_BTC in trace.experts.items():
                experts[at].append(experts_BTC.flatten(0, -2).cpu())
    if not experts:
        raise no_targets()
    merged.experts = {at: torch.cat(parts) for at, parts in experts.items()}
    merged.active = dict.fromkeys(loop for _, loop in experts)  # every token ran every loop
    return routing_by_layer(merged)


@checked
def routing_by_layer(trace: LoopTrace) -> list[LayerRouting]:
    """Measure the routing of every mixture layer that ``trace`` recorded.

    Args:
        trace: Trace of one call with ``keep_routing``, in which every token ran every loop.

    Raises:
        ConfigError: The trace holds no routing, or tokens exited before the last loop.
    """
    layers = sorted({layer for layer, _ in trace.experts})
    if not layers or any(active is not None for active in trace.active.values()):
        raise ConfigError(
            "no routing to compare", where="trace",
            value="no routing" if not layers else "tokens that exited early",
            allowed="a call of a model with experts, trace=LoopTrace(keep_routing=True), "
            "all rows at one depth",
            fix="rerun the model with such a trace",
        )  # fmt: skip
    return [_layer(trace, layer) for layer in layers]


def _layer(trace: LoopTrace, layer: int) -> LayerRouting:
    load_LE = trace.load_by_loop(layer).double().cpu()
    n_loops, n_experts = load_LE.shape
    share_LE = load_LE / load_LE.sum(-1, keepdim=True)
    entropy_L = _bits(share_LE)
    mean_LL = (entropy_L.unsqueeze(0) + entropy_L.unsqueeze(1)) / 2
    mixed_LL = _bits((share_LE.unsqueeze(0) + share_LE.unsqueeze(1)) / 2)
    chosen = [trace.experts[layer, loop].flatten(0, -2) for loop in range(n_loops)]
    disjoint_LL = torch.zeros(n_loops, n_loops)
    for i, j in combinations(range(n_loops), 2):
        same_NCC = chosen[i].unsqueeze(-1) == chosen[j].unsqueeze(-2)
        disjoint_LL[i, j] = disjoint_LL[j, i] = (~same_NCC.flatten(1).any(-1)).float().mean()
    return LayerRouting(
        layer=layer,
        load=share_LE.tolist(),
        entropy=trace.routing_entropy(layer).tolist(),
        divergence=(mixed_LL - mean_LL).clamp(0, 1).tolist(),
        overlap=trace.expert_overlap(layer).tolist(),
        disjoint=disjoint_LL.tolist(),
        information=float((_bits(share_LE.mean(0)) - entropy_L.mean()).clamp_min(0)),
        chance=(n_loops - 1) * (n_experts - 1) / (2 * float(load_LE.sum()) * math.log(2)),
    )


def _bits(share_E: Tensor) -> Tensor:
    """Return the entropy of the last axis in bits."""
    return -torch.special.xlogy(share_E, share_E).sum(-1) / math.log(2)
