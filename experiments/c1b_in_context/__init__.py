"""C1b: more hops through facts that are told in the prompt, by looping more."""

from experiments.c1b_in_context.answer import plot, summarise
from experiments.c1b_in_context.cells import CLAIM, cells
from experiments.c1b_in_context.measure import run_cell

__all__ = ["CLAIM", "cells", "plot", "run_cell", "summarise"]
