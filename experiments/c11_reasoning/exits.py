"""Early exit on puzzles: does a trained gate stop early on easy puzzles?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch

from experiments.tasks.puzzle import Puzzle, Questions
from open_mythos.data import IGNORE_INDEX, Batch
from open_mythos.evaluation.early_exit import Variant, run_exits, wall_clock
from open_mythos.evaluation.frozen import frozen
from open_mythos.model.exit_rules import exit_rule
from open_mythos.model.mythos import OpenMythos
from open_mythos.train import GateConfig, train_gate

_FRESH = 1 << 20
"""First step of puzzles not drawn in training."""
THRESHOLD = 0.99
REPEATS = 3


def measure_gate(
    model: OpenMythos,
    task: Puzzle,
    questions: Questions,
    seed: int,
    levels: Sequence[str],
    n_loops: int,
    *,
    rows: int,
    positions: int,
    steps: int,
) -> dict[str, Any]:
    """Train the gate on fresh puzzles and solve ``questions`` with it in up to ``n_loops`` loops.

    Returns:
        "loops" per cell and "by_level", the share "solved", that at full depth, and the seconds of
        both.
    """
    config = GateConfig(n_loops=n_loops, positions=positions, steps=steps, seed=seed)
    train_gate(model, _puzzles(task, rows), config)
    rule, test = exit_rule(f"gate:{THRESHOLD}", model), _batch(questions)
    asked = test.to(model.final_norm.weight.device)
    variants: list[Variant] = [(n_loops, [rule]), (n_loops, [None])]
    with frozen(model, torch.float32):
        early, full = (run_exits(model, [asked], *variant) for variant in variants)
        seconds = wall_clock(model, [asked], variants, REPEATS)
    loops_M = early.exits[0].double().mean(1).numpy()
    return {
        "loops": float(loops_M.mean()),
        "by_level": {level: float(loops_M[questions.level(level)].mean()) for level in levels},
        "solved": _solved(early.right_N, test), "solved_full": _solved(full.right_N, test),
        "seconds": seconds[0], "seconds_full": seconds[1],
    }  # fmt: skip


def _puzzles(task: Puzzle, rows: int) -> Iterator[Batch]:
    return (task.batch(step, global_batch=rows) for step in count(_FRESH))


def _batch(questions: Questions) -> Batch:
    return Batch(questions.ids, questions.targets, None, torch.arange(len(questions.ids)))


def _solved(right_N: torch.Tensor, test: Batch) -> float:
    """Return the share of rows whose every target is right."""
    wrong_BT = torch.zeros(test.targets.shape, dtype=torch.bool)
    wrong_BT[test.targets != IGNORE_INDEX] = ~right_N.bool()
    return float((~wrong_BT.any(1)).double().mean())
