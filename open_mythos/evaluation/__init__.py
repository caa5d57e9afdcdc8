"""Evaluation of trained models: loss by depth, early exit, expert routing by loop."""

from open_mythos.evaluation.early_exit import ExitReport, ExitRow, GivenDepths, evaluate_exits
from open_mythos.evaluation.perplexity import DepthRow, evaluate_depths
from open_mythos.evaluation.routing import LayerRouting, expert_routing, routing_by_layer

__all__ = [
    "DepthRow",
    "ExitReport",
    "ExitRow",
    "GivenDepths",
    "LayerRouting",
    "evaluate_depths",
    "evaluate_exits",
    "expert_routing",
    "routing_by_layer",
]
