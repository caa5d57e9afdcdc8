"""Facts that were never composed in training, composed."""

from experiments.systematic.answer import plot, summarise
from experiments.systematic.cells import CLAIM, cells
from experiments.systematic.measure import run_cell

__all__ = ["CLAIM", "cells", "plot", "run_cell", "summarise"]
