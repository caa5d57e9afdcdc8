"""Evaluation of trained models: loss and answers by depth, early exit, expert routing by loop."""

from open_mythos.evaluation.answers import (
    AnswerRow,
    Question,
    evaluate_answers,
    read_questions,
)
from open_mythos.evaluation.early_exit import ExitReport, ExitRow, GivenDepths, evaluate_exits
from open_mythos.evaluation.perplexity import DepthRow, evaluate_depths
from open_mythos.evaluation.routing import LayerRouting, expert_routing, routing_by_layer

__all__ = [
    "AnswerRow",
    "DepthRow",
    "ExitReport",
    "ExitRow",
    "GivenDepths",
    "LayerRouting",
    "Question",
    "evaluate_answers",
    "evaluate_depths",
    "evaluate_exits",
    "expert_routing",
    "read_questions",
    "routing_by_layer",
]
