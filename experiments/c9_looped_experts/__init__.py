"""C9: whether experts make loops pay, and whether tokens meet other experts at other loops."""

from experiments.c9_looped_experts.answer import plot, summarise
from experiments.c9_looped_experts.cells import CLAIM, cells
from experiments.c9_looped_experts.training import run_cell

__all__ = ["CLAIM", "cells", "plot", "run_cell", "summarise"]
