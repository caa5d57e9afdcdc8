"""C6: how much less the cache of latent attention holds, counted and measured."""

from experiments.c6_cache.answer import plot, summarise
from experiments.c6_cache.cells import CLAIM, cells
from experiments.c6_cache.measure import run_cell

__all__ = ["CLAIM", "cells", "plot", "run_cell", "summarise"]
