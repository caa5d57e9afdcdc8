"""Measuring a trained model: its loss at every depth, what an exit rule saves, and what its experts
do at every loop."""

from open_mythos.evaluation.early_exit import ExitReport, ExitRow, GivenDepths, evaluate_exits
from open_mythos.evaluation.perplexity import DepthRow, evaluate_depths
from open_mythos.evaluation.routing import LayerRouting, expert_routing

__all__ = [
    "DepthRow",
    "ExitReport",
    "ExitRow",
    "GivenDepths",
    "LayerRouting",
    "evaluate_depths",
    "evaluate_exits",
    "expert_routing",
]
