"""C3: a looped model against a dense one with twice its layers."""

from experiments.c3_half_the_parameters.answer import plot, summarise
from experiments.c3_half_the_parameters.cells import CLAIM, cells, run_cell

__all__ = ["CLAIM", "cells", "plot", "run_cell", "summarise"]
