"""C1: longer chains than in training, answered by looping more."""

from experiments.c1_depth.answer import summarise
from experiments.c1_depth.cells import CLAIM, cells
from experiments.c1_depth.measure import run_cell
from experiments.c1_depth.picture import plot

__all__ = ["CLAIM", "cells", "plot", "run_cell", "summarise"]
