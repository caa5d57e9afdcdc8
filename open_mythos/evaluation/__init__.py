"""Measuring a trained model: its loss at every depth, and what its experts do at every loop."""

from open_mythos.evaluation.perplexity import DepthRow, evaluate_depths
from open_mythos.evaluation.routing import LayerRouting, expert_routing

__all__ = ["DepthRow", "LayerRouting", "evaluate_depths", "expert_routing"]
