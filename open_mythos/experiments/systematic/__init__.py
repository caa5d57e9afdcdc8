"""Facts that were never composed in training, composed."""

from open_mythos.experiments.systematic.answer import plot, summarise
from open_mythos.experiments.systematic.cells import CLAIM, cells
from open_mythos.experiments.systematic.measure import run_cell

__all__ = ["CLAIM", "cells", "plot", "run_cell", "summarise"]
