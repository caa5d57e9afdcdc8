"""Summary of the loops of a step, from its trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from open_mythos.model.trace import PER_ROW, LoopTrace, load_entropy

_LOGGED = {"correlation": "token_correlation"}


@dataclass(frozen=True)
class LoopSummary:
    """Means over rows and expert loads of a step; made by :meth:`of`."""

    rows: list[int]
    """(L,) sequences that ran each loop."""
    means: dict[str, list[float]]
    """"state_norm", "delta_norm" and, where it was measured, "correlation" -> (L,) mean over the
    sequences that ran each loop."""
    load: dict[int, Tensor]
    """Mixture layer -> (L, E) tokens that chose each expert at each loop; float64, on the CPU."""

    @classmethod
    def of(cls, trace: LoopTrace) -> LoopSummary:
        """Summarize the trace of all micro-batches and processes; reads it from the device."""
        names = [name for name in PER_ROW if getattr(trace, name)]
        loops = range(trace.n_loops)
        means: dict[str, list[float]] = {}
        if names:
            # one tensor, and so one host-device sync
            found = torch.stack([getattr(trace, name)[t].mean() for name in names for t in loops])
            means = dict(zip(names, found.view(len(names), -1).tolist(), strict=True))
        return cls(
            rows=[len(trace.state_norm[t]) for t in loops],
            means=means,
            load={
                layer: trace.load_by_loop(layer).double().cpu()
                for layer in sorted({layer for layer, _ in trace.load})
            },
        )

    def expert_share(self, layer: int) -> list[float]:
        """Return the (E,) share of all choices that each expert got, over all loops."""
        load_E = self.load[layer].sum(0)
        return (load_E / load_E.sum().clamp_min(1)).tolist()

    def metrics(self, detail: bool = False) -> dict[str, Any]:
        """Return logged name -> list with an entry per loop.

        With ``detail``, also the share of every expert at every loop, L E numbers per layer.
        """
        metrics: dict[str, Any] = {_LOGGED.get(name, name): x for name, x in self.means.items()}
        for layer, load_LE in self.load.items():
            share_LE = load_LE / load_LE.sum(-1, keepdim=True).clamp_min(1)
            metrics[f"router_entropy/layer{layer}"] = load_entropy(load_LE).tolist()
            metrics[f"router_min/layer{layer}"] = share_LE.amin(-1).tolist()
            metrics[f"router_max/layer{layer}"] = share_LE.amax(-1).tolist()
            if detail:
                rows = [[round(share, 4) for share in row] for row in share_LE.tolist()]
                metrics[f"router_share/layer{layer}"] = rows
        return metrics


def depth_metrics(depths_B: Tensor | Sequence[int]) -> dict[str, Any]:
    """Return mean and maximum of the depths, and how many sequences ran 1, 2, ... loops."""
    depths = torch.as_tensor(depths_B)
    return {
        "mean_depth": depths.double().mean().item(),
        "max_depth": int(depths.max()),
        "depth_histogram": torch.bincount(depths.long().flatten())[1:].tolist(),
    }
