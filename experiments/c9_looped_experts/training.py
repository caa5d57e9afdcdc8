"""Training one arm, and looking at what its experts do at every loop."""

from __future__ import annotations

import weakref
from statistics import mean
from typing import Any

from torch import Tensor

from experiments.c9_looped_experts.cells import TIED
from experiments.claim import Cell, Place
from experiments.text import train
from open_mythos.accounting import account
from open_mythos.config import MythosConfig
from open_mythos.evaluation import expert_routing
from open_mythos.model.context import Context
from open_mythos.model.layers.block import TransformerBlock
from open_mythos.model.layers.experts import Operands
from open_mythos.model.layers.moe import MoEFFN
from open_mythos.model.mythos import OpenMythos
from open_mythos.train.build import Model

_ROUTED_BATCHES = 4


class TiedExperts(MoEFFN):
    """Experts that each token is given at its first loop and keeps; their weights may change."""

    def __init__(self, cfg: MythosConfig, layer: int = 0) -> None:
        super().__init__(cfg, layer)
        self._call: weakref.ref[Context] | None = None
        self._first_NC: Tensor | None = None

    def operands(self, x_BTD: Tensor, ctx: Context | None) -> Operands:
        """Return the weights; a call that was not seen before is at its first loop."""
        assert ctx is not None
        if self._call is None or self._call() is not ctx:
            self._call, self._first_NC = weakref.ref(ctx), None
        return super().operands(x_BTD, ctx)

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`MoEFFN.route`, with the choice of loop 0."""
        scores_NE, experts_NC, weights_NC = super().route(x_ND)
        if self._first_NC is None:
            self._first_NC = experts_NC
            return scores_NE, experts_NC, weights_NC
        weights_NC = scores_NE.gather(-1, self._first_NC)
        return scores_NE, self._first_NC, weights_NC / weights_NC.sum(-1, keepdim=True)


def tie_experts(model: Model) -> None:
    """Exchange the mixtures of a model for tied ones with the same weights."""
    for block in list(model.modules()):
        if isinstance(block, TransformerBlock) and isinstance(block.ffn, MoEFFN):
            tied = TiedExperts(model.cfg, block.layer)
            tied.load_state_dict(block.ffn.state_dict())
            block.ffn = tied


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Train; measure the loss, and how much of its routing changes from loop to loop."""
    s = cell.settings
    trained = train(cell, place, tie_experts if s["control"] == TIED else lambda model: None)
    counts = account(trained.model)
    figures = trained.costs() | {
        "loss": trained.losses([s["loops"]])[0],
        "active_parameters": counts.active_parameters - counts.active["embedding"]
        - counts.active["head"],
    }  # fmt: skip
    if s["experts"] > 1:
        assert isinstance(trained.model, OpenMythos)
        layers = expert_routing(trained.model, trained.batches[:_ROUTED_BATCHES], s["loops"])
        figures["entropy"] = mean(each for layer in layers for each in layer.entropy)
        if s["loops"] > 1:
            consecutive = [(layer, t) for layer in layers for t in range(s["loops"] - 1)]
            figures["disjoint"] = mean(layer.disjoint[t][t + 1] for layer, t in consecutive)
            figures["common"] = mean(layer.overlap[t][t + 1] for layer, t in consecutive)
    return figures
