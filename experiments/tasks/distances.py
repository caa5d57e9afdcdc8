"""DISTANCES: how far is every node of a directed graph from a source?

A row is the edges of a fresh random graph in no order, the source, and a question for every node;
the target at a question is the length of the shortest path from the source, 0 for a node that it
does not reach (or only in more than ``farthest`` steps). Only the questions are labelled, and only
with the answer: which nodes are reached after so many steps is nowhere said, and a graph has
several open branches at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from open_mythos.checks import check_count
from open_mythos.data import Batch
from open_mythos.data.batch import IGNORE_INDEX
from open_mythos.data.permutation import Int64Array
from open_mythos.errors import ConfigError
from open_mythos.seeding import derive_seed


@dataclass(frozen=True)
class Graphs:
    """Drawn graphs and the distances in them."""

    edges: Int64Array
    """(M, E) edges, tail * nodes + head."""
    source: Int64Array
    """(M,)"""
    distance: Int64Array
    """(M, nodes) from the source; the number of nodes where there is no path."""


@dataclass(frozen=True)
class Distances:
    """The task; tokens are edges, then sources, then questions."""

    nodes: int = 12
    edges: int = 20
    farthest: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("nodes", self.nodes, 2)
        most = self.nodes * (self.nodes - 1)
        if check_count("edges", self.edges) > most:
            raise ConfigError(
                "more edges than pairs of nodes", where="edges", value=self.edges,
                allowed=f"1 .. {most}", fix="lower edges, or raise nodes",
            )  # fmt: skip
        check_count("farthest", self.farthest)

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens."""
        return self.nodes**2 + 2 * self.nodes

    @property
    def length(self) -> int:
        """Return the tokens of a row: edges, source, questions."""
        return self.edges + 1 + self.nodes

    def graphs(self, step: int, count: int, stream: str = "train") -> Graphs:
        """Draw ``count`` graphs, a pure function of the arguments."""
        check_count("step", step, 0)
        check_count("count", count)
        rng = np.random.default_rng(derive_seed(self.seed, f"distances/{stream}", step))
        n = self.nodes
        tail, head = np.divmod(np.arange(n * n), n)
        pairs = (tail * n + head)[tail != head]
        order = rng.random((count, len(pairs))).argpartition(self.edges - 1, axis=1)
        edges_ME = pairs[order[:, : self.edges]]
        return self.measured(edges_ME, rng.integers(n, size=count))

    def measured(self, edges_ME: Int64Array, source_M: Int64Array) -> Graphs:
        """Return graphs with the distances from their sources."""
        n, count = self.nodes, len(source_M)
        linked_ME = np.zeros((count, n * n), np.float32)
        np.put_along_axis(linked_ME, edges_ME, 1, axis=1)
        linked_Mnn = linked_ME.reshape(count, n, n)
        distance_Mn = np.full((count, n), n)
        front_Mn = np.arange(n) == source_M[:, None]
        for step in range(n):
            distance_Mn[front_Mn] = step
            next_Mn = np.einsum("mu,muv->mv", front_Mn.astype(np.float32), linked_Mnn) > 0
            front_Mn = next_Mn & (distance_Mn == n)
        return Graphs(edges_ME, source_M, distance_Mn)

    def batch(self, step: int, *, global_batch: int) -> Batch:
        """Draw the rows (B, length) of ``step``, a pure function of the arguments."""
        graphs = self.graphs(step, global_batch)
        first = step * global_batch
        targets = np.full((global_batch, self.length), IGNORE_INDEX)
        targets[:, -self.nodes :] = self.answers(graphs)
        return Batch(
            self.tokens(graphs), torch.from_numpy(targets), None,
            torch.arange(first, first + global_batch),
        )  # fmt: skip

    def tokens(self, graphs: Graphs) -> torch.Tensor:
        """Return the ids (M, length)."""
        count, n = len(graphs.source), self.nodes
        questions = np.tile(n * n + n + np.arange(n), (count, 1))
        return torch.from_numpy(np.c_[graphs.edges, n * n + graphs.source, questions])

    def answers(self, graphs: Graphs) -> Int64Array:
        """Return (M, nodes) distances; 0 out of reach, -100 (no question) at the source."""
        far = graphs.distance > self.farthest
        return np.where(graphs.distance == 0, IGNORE_INDEX, np.where(far, 0, graphs.distance))
