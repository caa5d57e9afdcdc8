"""C5: how the loss falls with the number of loops, and where it stops falling."""

from experiments.c5_saturation.answer import plot, summarise
from experiments.c5_saturation.cells import CLAIM, cells, run_cell

__all__ = ["CLAIM", "cells", "plot", "run_cell", "summarise"]
