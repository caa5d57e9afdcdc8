"""Synthetic tasks: every batch is a pure function of the task, its seed and the step."""

from experiments.tasks.facts import ComposedFacts
from experiments.tasks.in_context import InContextHop
from experiments.tasks.loader import TaskLoader
from experiments.tasks.permhop import PermHop, PermHopLoader

__all__ = ["ComposedFacts", "InContextHop", "PermHop", "PermHopLoader", "TaskLoader"]
