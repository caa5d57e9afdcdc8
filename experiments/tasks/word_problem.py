"""S5: the word problem of the permutations of five things, the standard task of state tracking.

A word is a start and a sequence of generators; the label at each position is the product so far,
one of 120 elements. It is PERM-HOP on the elements of the group: relation r multiplies by generator
r. The problem is complete for NC1 (Barrington's theorem): no circuit of constant depth, and so no
transformer of fixed depth, is known to solve it at every length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from math import factorial

import numpy as np

from experiments.tasks.permhop import PermHop
from open_mythos.checks import check_count
from open_mythos.data.permutation import Int64Array
from open_mythos.errors import ConfigError
from open_mythos.seeding import derive_seed


@dataclass(frozen=True)
class WordProblem(PermHop):
    """The task; tokens are the 120 elements as starts, then the generators, drawn by ``seed``."""

    entities: int = factorial(5)
    relations: int = 4

    def __post_init__(self) -> None:
        check_count("relations", self.relations, 2)
        if self.entities != factorial(5):
            raise ConfigError(
                "the group has 120 elements", where="entities", value=self.entities, allowed="120",
                fix="leave it out",
            )  # fmt: skip

    @cached_property
    def tables(self) -> Int64Array:
        """Return the product of element e and generator r, (R, 120) int64."""
        elements = np.array(list(permutations(range(5))))
        number = {tuple(element): i for i, element in enumerate(elements.tolist())}
        rng = np.random.default_rng(derive_seed(self.seed, "word problem/generators"))
        while True:
            chosen = rng.choice(np.arange(1, self.entities), self.relations, replace=False)
            tables = np.array([
                [number[tuple(element[generator].tolist())] for element in elements]
                for generator in elements[chosen]
            ])  # fmt: skip
            if len(_reached(tables)) == self.entities:
                return tables


def _reached(tables: Int64Array) -> set[int]:
    """Return the elements that words over the generators reach from the first."""
    found, new = {0}, {0}
    while new:
        new = {int(table[e]) for table in tables for e in new} - found
        found |= new
    return found
