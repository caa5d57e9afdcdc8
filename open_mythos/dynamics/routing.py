"""Do tokens meet different experts at different loops? Compared loop by loop.

Where looped mixtures gain over one pass, routing differs between loops (arXiv 2605.09165).
:func:`open_mythos.evaluation.expert_routing` gives loads and overlaps over whole data sets; here
are the distances between loops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.errors import ConfigError
from open_mythos.model.trace import LoopTrace


@dataclass(frozen=True)
class RoutingDivergence:
    """One mixture layer, every pair of L loops."""

    layer: int
    """Number of the block in the model."""
    divergence_LL: Tensor
    """Jensen-Shannon divergence of two loops' expert loads, in bits: 0 equal, 1 no expert shared.
    It sees only totals: tokens that swap experts with one another leave it at 0."""
    overlap_LL: Tensor
    """Share of a token's experts that two loops have in common; C / E by chance."""
    disjoint_LL: Tensor
    """Share of tokens that meet no expert of the one loop again in the other."""
    information: float
    """Mutual information of loop and expert in bits: what knowing the loop says about the expert
    of a choice. At most log2 of the number of loops or experts."""
    chance: float
    """The information that independent choices would show by their finite number alone:
    (L - 1)(E - 1) / (2 choices ln 2) bits (Miller and Madow, 1955)."""


def routing_divergence(trace: LoopTrace) -> list[RoutingDivergence]:
    """The divergence of every mixture layer that ``trace`` saw.

    Args:
        trace: Of one forward call, with ``keep_routing``, in which every token ran every loop.

    Raises:
        ConfigError: The trace holds no choices, or rows left before the last loop.
    """
    layers = sorted({layer for layer, _ in trace.experts})
    if not layers or any(active is not None for active in trace.active.values()):
        raise ConfigError(
            "no routing to compare", where="trace",
            value="no choices" if not layers else "rows that left early",
            allowed="a call of a model with experts, trace=LoopTrace(keep_routing=True), "
            "all rows at one depth",
            fix="run the model again with such a trace",
        )  # fmt: skip
    return [_layer(trace, layer) for layer in layers]


def _layer(trace: LoopTrace, layer: int) -> RoutingDivergence:
    load_LE = trace.load_by_loop(layer).double().cpu()
    share_LE = load_LE / load_LE.sum(-1, keepdim=True)
    n_loops, n_experts = load_LE.shape
    mixed_LLE = (share_LE.unsqueeze(0) + share_LE.unsqueeze(1)) / 2
    entropy_L = _entropy(share_LE)
    own_LL = (entropy_L.unsqueeze(0) + entropy_L.unsqueeze(1)) / 2
    chosen_LNE = torch.stack([
        _chosen(trace.experts[layer, loop], n_experts) for loop in range(n_loops)
    ])  # fmt: skip
    shared_LLN = torch.einsum("lne,mne->lmn", chosen_LNE, chosen_LNE)
    return RoutingDivergence(
        layer=layer,
        divergence_LL=(_entropy(mixed_LLE) - own_LL).clamp(0, 1),
        overlap_LL=trace.expert_overlap(layer),
        disjoint_LL=(shared_LLN == 0).double().mean(-1),
        information=float((_entropy(share_LE.mean(0)) - entropy_L.mean()).clamp_min(0)),
        chance=(n_loops - 1) * (n_experts - 1) / (2 * float(load_LE.sum()) * math.log(2)),
    )


def _chosen(experts_BTC: Tensor, n_experts: int) -> Tensor:
    """(N, E): 1 where a token chose an expert."""
    experts_NC = experts_BTC.flatten(0, -2).cpu()
    return torch.zeros(len(experts_NC), n_experts).scatter_(1, experts_NC, 1.0)


def _entropy(share_E: Tensor) -> Tensor:
    """(...) entropy of the last axis in bits."""
    return -torch.special.xlogy(share_E, share_E).sum(-1) / math.log(2)
