"""C4: does adaptive halting give harder tokens more loops at equal quality and less compute?"""

from __future__ import annotations

from typing import Any

from experiments.c4_halting.answer import plot, summarise
from experiments.c4_halting.cells import ACT, CHAINS, CLAIM, TEXT, cells
from experiments.c4_halting.chains import run_act, run_chains
from experiments.c4_halting.prose import run_text
from experiments.claim import Cell, Place

__all__ = ["CLAIM", "cells", "plot", "run_cell", "summarise"]

_RUN = {CHAINS: run_chains, ACT: run_act, TEXT: run_text}


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Run a cell of chains, ACT or text."""
    return _RUN[cell.arm](cell, place)
