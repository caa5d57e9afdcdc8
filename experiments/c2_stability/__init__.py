"""C2: which ways of feeding the input back survive which learning rates."""

from experiments.c2_stability.answer import plot, summarise
from experiments.c2_stability.cells import CLAIM, cells
from experiments.c2_stability.training import run_cell

__all__ = ["CLAIM", "cells", "plot", "run_cell", "summarise"]
