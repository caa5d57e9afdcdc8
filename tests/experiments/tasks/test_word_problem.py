"""S5: generators are permutations that reach the whole group."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from experiments.tasks.word_problem import WordProblem
from open_mythos.errors import ConfigError

TASK = WordProblem()
ELEMENTS = list(permutations(range(5)))


def test_labels_are_products_of_the_generators():
    generators = [ELEMENTS[table[0]] for table in TASK.tables]  # element 0 is the identity
    batch = TASK.batch(0, global_batch=20, hops=6)
    for ids, targets in zip(batch.input_ids.tolist(), batch.targets.tolist(), strict=True):
        product = ELEMENTS[ids[0]]
        for token, target in zip(ids[1:], targets[1:], strict=True):
            product = tuple(product[i] for i in generators[token - 120])
            assert target in (-100, ELEMENTS.index(product))


def test_the_generators_reach_every_element_and_do_not_commute():
    reached = {0}
    while new := {int(t[e]) for t in TASK.tables for e in reached} - reached:
        reached |= new
    assert len(reached) == TASK.entities == 120
    first, second = TASK.tables[:2]
    assert not np.array_equal(first[second], second[first])


def test_another_group_is_refused():
    with pytest.raises(ConfigError, match="120"):
        WordProblem(entities=60)
