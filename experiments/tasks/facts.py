"""COMPOSED FACTS: some facts are composed in training, others never are.

The graph is that of PERM-HOP: N entities, R relations, a fact r(e) for each pair. A random share of
the facts is *lone*: shown only as ``<e> <r>``. All others are also shown in chains
``<e> <r1> ... <rk>``, except for the chains that PERM-HOP holds out. Training never shows:

- "known": held-out chains of facts that occur in other chains (in-distribution generalization);
- "lone": chains of lone facts only (systematic generalization). "lone-first" and "lone-last" have
  a single lone fact, at one end of the chain.

The split follows arXiv 2405.15071.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from experiments.tasks.permhop import PermHop
from open_mythos.data.batch import IGNORE_INDEX, Batch
from open_mythos.data.permutation import Int64Array
from open_mythos.errors import ConfigError
from open_mythos.seeding import seeded_generator

KINDS = ("trained", "known", "lone", "lone-first", "lone-last")
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ComposedFacts:
    """The task: a graph with its held-out chains, and the share of lone facts."""

    graph: PermHop = field(default_factory=lambda: PermHop(entities=64, relations=8))
    lone_share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.lone_share < 1:
            raise ConfigError(
                "not a share", where="lone_share", value=self.lone_share, allowed="0 < x < 1"
            )

    @cached_property
    def lone(self) -> BoolArray:
        """Return whether the fact r(e) is lone, (R, N)."""
        shape = self.graph.relations, self.graph.entities
        generator = seeded_generator(self.graph.seed, "facts/lone")
        return (torch.rand(shape, generator=generator) < self.lone_share).numpy()

    def batch(self, step: int, *, global_batch: int, hops: int, chains: int = 1) -> Batch:
        """Draw the training rows (B, chains * (hops + 1)) of ``step``, of ``chains`` each.

        The first relation of a chain is labeled; a later one only if no fact up to it is lone and
        the chain up to it is not held out.
        """
        drawn = self.graph.batch(step, global_batch=global_batch, hops=hops, chains=chains)
        tokens = drawn.input_ids.view(-1, hops + 1).numpy()
        entity_B, relations_BK = tokens[:, 0], tokens[:, 1:] - self.graph.entities
        labelled_BK = self.kinds(entity_B, relations_BK)["trained"]
        targets_BK = np.where(labelled_BK, self.graph.answers(entity_B, relations_BK), IGNORE_INDEX)
        unlabelled_B1 = np.full((len(entity_B), 1), IGNORE_INDEX, np.int64)
        targets = torch.from_numpy(np.c_[unlabelled_B1, targets_BK]).view(global_batch, -1)
        return Batch(drawn.input_ids, targets, None, drawn.sample_index)

    def questions(self, kind: str, hops: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return every chain of a kind (Q, hops + 1) and the answers (Q,)."""
        if kind not in KINDS:
            raise ConfigError(
                "no such kind of chain", where="kind", value=kind, allowed=", ".join(KINDS)
            )
        n, r = self.graph.entities, self.graph.relations
        entity_B, *later = np.indices((n, *[r] * hops)).reshape(hops + 1, -1)
        relations_BK = np.stack(later, axis=1)
        asked_B = self.kinds(entity_B, relations_BK)[kind][:, -1]
        answers_B = self.graph.answers(entity_B, relations_BK)[asked_B, -1]
        tokens = np.c_[entity_B, relations_BK + n][asked_B]
        return torch.from_numpy(tokens), torch.from_numpy(answers_B)

    def first_hops(self, ids_BT: torch.Tensor, *, lone: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Replace the first hop of chains by another fact, lone or not, to the same entity.

        Returns:
            The chains (B, T), and whether there is such a fact (B,); a chain without one is kept.
        """
        n = self.graph.entities
        tokens = ids_BT.numpy().copy()
        relation_B = tokens[:, 1] - n
        reached_B = self.graph.tables[relation_B, tokens[:, 0]]
        from_RB = np.argsort(self.graph.tables, axis=1)[:, reached_B]  # the inverse permutations
        relation_R1 = np.arange(self.graph.relations)[:, None]
        usable_RB = (self.lone[relation_R1, from_RB] == lone) & (relation_R1 != relation_B)
        there_B, chosen_B = usable_RB.any(axis=0), usable_RB.argmax(axis=0)
        hop_B2 = np.c_[from_RB[chosen_B, np.arange(len(tokens))], chosen_B + n]
        tokens[there_B, :2] = hop_B2[there_B]
        return torch.from_numpy(tokens), torch.from_numpy(there_B)

    def kinds(self, entity_B: Int64Array, relations_BK: Int64Array) -> dict[str, BoolArray]:
        """Return kind -> whether the prefix ending at each relation is of that kind, (B, K)."""
        reached_BK = self.graph.answers(entity_B, relations_BK)
        from_BK = np.c_[entity_B, reached_BK[:, :-1]]
        lone_BK = self.lone[relations_BK, from_BK]
        count_BK = lone_BK.cumsum(axis=1)
        length_K = np.arange(1, relations_BK.shape[1] + 1)
        composed_BK = np.broadcast_to(length_K > 1, lone_BK.shape)
        held_out_BK = self.graph.is_held_out(entity_B, relations_BK)
        known_BK = count_BK == 0
        one_BK = composed_BK & (count_BK == 1)
        return {
            "trained": ~composed_BK | (known_BK & ~held_out_BK),
            "known": known_BK & held_out_BK,
            "lone": composed_BK & (count_BK == length_K),
            "lone-first": one_BK & lone_BK[:, :1],
            "lone-last": one_BK & lone_BK,
        }
