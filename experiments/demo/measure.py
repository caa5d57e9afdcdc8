"""Evaluate the demo's models on their tasks."""

from __future__ import annotations

import numpy as np
import torch

from experiments.c1_depth import chain_recipe as chains
from experiments.c11_reasoning import sudoku_recipe as sudoku
from experiments.demo.results import ChainResults, SudokuResults, TextResults
from experiments.demo.setup import (
    EVAL_DEPTHS,
    EXIT_RULE,
    HOP_LOOPS,
    PROMPT,
    PUZZLES,
    PUZZLES_PER_LEVEL,
    SAMPLE_DEPTHS,
    SAMPLE_TOKENS,
    SHOWN_LOOPS,
    SUDOKU_LOOPS,
    TEST_HOPS,
    TRAINED_DEPTH,
)
from experiments.demo.training import Trained
from experiments.tasks.puzzle import Answers, Questions, answers
from open_mythos.data import TokenShards
from open_mythos.model.depth import Depth
from open_mythos.model.exit_rules import exit_rule
from open_mythos.model.generation import generate
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.trace import LoopTrace
from open_mythos.ops.sampling import SamplingParams
from open_mythos.tokenizer import Tokenizer
from open_mythos.train import RunConfig


def measure_chains(looped: Trained, dense: Trained, quick: bool) -> ChainResults:
    """Ask for chains of every length at every number of loops."""
    assert isinstance(looped.model, OpenMythos)
    programs = 200 if quick else 4096  # a tenth of them is held out and evaluated
    exits = [_with_early_exit(looped.model, hops, programs) for hops in TEST_HOPS]
    exit_loops, exit_accuracy = zip(*exits, strict=True)
    of_dense = chains.accuracy_grid(dense.model, TEST_HOPS, HOP_LOOPS, programs)
    return ChainResults(
        hops=list(TEST_HOPS), entities=chains.TASK.entities, loops=list(HOP_LOOPS),
        chosen_loops=chains.CHOSEN_LOOPS, trained_hops=chains.TRAINED_HOPS,
        accuracy=chains.accuracy_grid(looped.model, TEST_HOPS, HOP_LOOPS, programs),
        dense_accuracy=[row[0] for row in of_dense],
        exit_rule=EXIT_RULE, exit_loops=list(exit_loops), exit_accuracy=list(exit_accuracy),
        looped=looped.curve, dense=dense.curve,
    )  # fmt: skip


def _with_early_exit(model: OpenMythos, hops: int, programs: int) -> tuple[float, float]:
    """Return mean loops and accuracy on chains of ``hops`` under the exit rule."""
    ids_BT, answers_B = chains.TASK.questions(hops, programs)
    trace = LoopTrace()
    rule = exit_rule(EXIT_RULE, model)
    logits = model(ids_BT, n_loops=HOP_LOOPS[-1], exit_rule=rule, trace=trace)
    assert trace.exits is not None
    right = logits[:, -1].argmax(-1) == answers_B
    return trace.exits[:, -1].float().mean().item(), right.float().mean().item()


def measure_sudoku(looped: Trained, dense: Trained, quick: bool) -> SudokuResults:
    """Ask for puzzles of every difficulty at every number of loops."""
    made = sudoku.TASK.questions(300 if quick else PUZZLES)
    questions = made.at_most(PUZZLES_PER_LEVEL, sudoku.LEVELS)
    found = answers(looped.model, questions.ids, SUDOKU_LOOPS, sudoku.TASK)
    of_dense = answers(dense.model, questions.ids, SUDOKU_LOOPS, sudoku.TASK)
    chosen = _shown_puzzle(questions, found)
    shown = {
        n: sudoku.TASK.filled(questions.ids, found.tokens[found.loops.index(n)])[chosen].tolist()
        for n in SHOWN_LOOPS
    }
    levels, grid = list(sudoku.LEVELS), sudoku.TASK.grid
    return SudokuResults(
        levels=levels, asked=[len(questions.level(level)) for level in levels],
        loops=found.loops, trained_loops=sudoku.TRAINED_LOOPS,
        solved=[found.solved(questions, level) for level in levels],
        dense_solved=[of_dense.solved(questions, level)[0] for level in levels],
        shape=(grid.height, grid.width),
        clues=sudoku.TASK.clues(questions.ids)[chosen].tolist(),
        solution=sudoku.TASK.filled(questions.ids, questions.targets)[chosen].tolist(),
        boards=shown, looped=looped.curve, dense=dense.curve,
    )  # fmt: skip


def _shown_puzzle(questions: Questions, found: Answers) -> int:
    """Choose a puzzle that needs a guess and is solved at the last loops shown, not before."""
    before, last = (found.right(questions, n).numpy() for n in SHOWN_LOOPS[-2:])
    return int(np.argmax(2 * (questions.guesses > 0) + (last & ~before)))


def measure_text(config: RunConfig, looped: Trained, dense: Trained, flops: Trained) -> TextResults:
    """Collect the evaluations of the text models and continue a prompt."""
    assert isinstance(looped.model, OpenMythos)
    shards = TokenShards(config.data.path, "val")
    tokenizer = shards.tokenizer()
    return TextResults(
        depths=list(EVAL_DEPTHS), looped_bits=[row["bits_per_byte"] for row in looped.rows],
        dense_bits=dense.rows[0]["bits_per_byte"], flops_bits=flops.rows[0]["bits_per_byte"],
        trained_depth=TRAINED_DEPTH,
        rho=looped.model.recurrent.injection.spectral_radius().item(),
        looped=looped.curve, dense=dense.curve, flops=flops.curve,
        samples={depth: _continue(looped, tokenizer, Depth(depth)) for depth in SAMPLE_DEPTHS},
        dense_sample=_continue(dense, tokenizer), prompt=PROMPT,
        train_bytes=round(looped.tokens * TokenShards(config.data.path).bytes_per_token),
        val_bytes=round(looped.rows[0]["tokens"] * shards.bytes_per_token),
    )  # fmt: skip


def _continue(run: Trained, tokenizer: Tokenizer, depth: Depth | None = None) -> str:
    """Return the greedy continuation of the prompt."""
    ids = tokenizer.encode(PROMPT)
    params = SamplingParams(SAMPLE_TOKENS, temperature=0.0, eos_token_id=tokenizer.eos_id)
    out = generate(run.model, torch.tensor([ids]), params, depth)
    return tokenizer.decode(out[0, len(ids) :].tolist())
