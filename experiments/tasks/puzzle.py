"""Puzzles that a model sees all at once: their test questions, a model's answers, its recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.data import IGNORE_INDEX, Batch
from open_mythos.data.permutation import Int64Array
from open_mythos.evaluation.frozen import frozen
from open_mythos.model.mythos import OpenMythos
from open_mythos.train import DepthConfig, OptimConfig, RunConfig, TrainConfig
from open_mythos.train.build import Model


class Puzzle(Protocol):
    """A task whose rows are puzzles: a dataclass that draws them."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def answers(self) -> slice:
        """The tokens that can be an answer."""

    def batch(self, step: int, *, global_batch: int) -> Batch:
        """Draw the rows (B, N) of ``step``, a pure function of the arguments."""

    def questions(self, count: int) -> Questions:
        """Draw ``count`` test puzzles, rated."""


@dataclass(frozen=True)
class Questions:
    """M test puzzles of N cells, and how hard they are for a solver."""

    ids: Tensor
    """(M, N)"""
    targets: Tensor
    """(M, N) answers; -100 at cells that are not asked."""
    rounds: Int64Array
    """(M,) rounds that solve the puzzle, or precede the first guess."""
    guesses: Int64Array
    """(M,) boards that a solver has to copy; 0 if rounds are enough, as in every maze."""

    def at_most(self, most: int, levels: Sequence[str]) -> Questions:
        """Return the first ``most`` puzzles of every difficulty."""
        return self.only(np.sort(np.concatenate([self.level(name)[:most] for name in levels])))

    def only(self, kept: np.ndarray) -> Questions:
        """Return the puzzles of an index or a mask."""
        return Questions(*(getattr(self, field.name)[kept] for field in fields(self)))

    def level(self, name: str) -> Int64Array:
        """Return the puzzles of a difficulty: "3", "6-7", "8+" rounds; "guess", "2-3 guesses"."""
        amount, _, guesses = ("1+ guesses" if name == "guess" else name).partition(" ")
        needed_M = self.guesses if guesses else np.where(self.guesses > 0, -1, self.rounds)
        low, _, high = amount.rstrip("+").partition("-")
        most = np.inf if amount.endswith("+") else int(high or low)
        return ((needed_M >= int(low)) & (needed_M <= most)).nonzero()[0]


@dataclass(frozen=True)
class Answers:
    """What a model answers at each number of loops; one for a dense model."""

    loops: list[int]
    tokens: list[Tensor]
    """(M, N) likeliest answers per number of loops."""

    def right(self, questions: Questions, loops: int) -> Tensor:
        """Return (M,) whether a puzzle is right in every cell asked, after ``loops``."""
        return _right(self.tokens[self.loops.index(loops)], questions).all(1)

    def solved(self, questions: Questions, level: str) -> list[float]:
        """Return the share of the puzzles of ``level`` that are right in every cell asked."""
        chosen = questions.level(level)
        return [float(self.right(questions, n)[chosen].double().mean()) for n in self.loops]

    def example(self, questions: Questions, early: int, late: int) -> dict[str, Any]:
        """Return the hardest puzzle that is solved after ``late`` loops and not after ``early``.

        Without one, the hardest. Lists of the ids, the targets, and the answers for each number of
        loops.
        """
        then, later = (self.right(questions, loops).numpy() for loops in (early, late))
        i = int(np.lexsort((questions.rounds, questions.guesses, later & ~then))[-1])
        tokens = [found[i].tolist() for found in self.tokens]
        return {"ids": questions.ids[i].tolist(), "targets": questions.targets[i].tolist(),
                "tokens": tokens}  # fmt: skip

    def cells(self, questions: Questions, level: str) -> list[float]:
        """Return the share of the cells asked in ``level`` that are right."""
        chosen = questions.level(level)
        asked = (questions.targets != IGNORE_INDEX)[chosen]
        right = [_right(found, questions)[chosen] for found in self.tokens]
        return [float(each[asked].double().mean()) for each in right]


def _right(found_MN: Tensor, questions: Questions) -> Tensor:
    return (found_MN == questions.targets) | (questions.targets == IGNORE_INDEX)


def answers(
    model: Model, ids_MN: Tensor, loops: Sequence[int], puzzle: Puzzle, rows: int = 512
) -> Answers:
    """Return what ``model`` answers in every cell after each of ``loops`` (rising)."""
    found: list[list[Tensor]] = []

    def read(logits_BNV: Tensor) -> Tensor:
        return logits_BNV[..., puzzle.answers].argmax(-1).cpu() + puzzle.answers.start

    with frozen(model, torch.float32) as device:
        for part in ids_MN.to(device).split(rows):
            if not isinstance(model, OpenMythos):
                found.append([read(model(part))])
                continue
            ctx = model.context(part)
            states = model.unroll(part, max(loops), ctx)
            found.append([read(model.logits(h_BTD, ctx)) for t, h_BTD in states if t + 1 in loops])
    shown = list(loops) if isinstance(model, OpenMythos) else [1]
    return Answers(shown, [torch.cat(parts) for parts in zip(*found, strict=True)])


def puzzle_recipe(
    vocab_size: int, length: int, *, loops: int, lr: float, steps: int, dim: int = 64,
    batch: int = 64, mixed_share: float = 0.5, rope_theta: float = 0.0, quick: bool = False,
    seed: int = 0,
) -> RunConfig:  # fmt: skip
    """Return the run of two blocks of width ``dim``, at ``loops`` loops.

    The depth of a share of the rows, ``mixed_share``, is uniform on 1 .. 2 ``loops`` instead.
    With ``rope_theta`` 0 attention has no positions: a token of ``vocab_size`` says itself where it
    stands among the ``length``. ``quick`` makes the run tiny for smoke tests.
    """
    if quick:
        dim, batch, steps = 16, 4, 3
    heads = max(4, dim // 16)
    model = MythosConfig(
        vocab_size=vocab_size, dim=dim, n_heads=heads, n_kv_heads=heads, attn_type="gqa",
        max_seq_len=length, max_loop_iters=loops, prelude_layers=0, recurrent_layers=2,
        coda_layers=0, n_experts=0, lora_rank=0, ffn_dim=2 * dim, rope_theta=rope_theta,
        causal=False,
    )  # fmt: skip
    return RunConfig(
        model=model,
        depth=DepthConfig(plan="mixed", mean=loops, mixed_share=mixed_share),
        optim=OptimConfig(name="muon", lr=lr, beta2=0.98),
        train=TrainConfig(
            seed=seed, steps=steps, warmup_steps=min(50, steps), seq_len=length,
            global_batch=batch, min_lr_ratio=0.02, log_every=max(1, steps // 40), device="cpu",
        ),
    )  # fmt: skip
