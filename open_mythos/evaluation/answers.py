"""Accuracy of generated answers by depth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from open_mythos.checks import check_count, check_fields, checked
from open_mythos.errors import DataError
from open_mythos.files import read_text
from open_mythos.inference.engine import Engine
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.depth import Depth
from open_mythos.model.exit_rules import ExitRule
from open_mythos.model.mode import evaluating
from open_mythos.ops.sampling import SamplingParams
from open_mythos.tokenizer import Tokenizer


@dataclass(frozen=True)
class Question:
    """A prompt and its only right continuation."""

    prompt: str
    answer: str

    def __post_init__(self) -> None:
        check_fields("", self)


@dataclass(frozen=True)
class AnswerRow:
    """Accuracy at one depth, JSON-compatible through ``dataclasses.asdict``."""

    depth: int | None
    """Most loops; None for a model without loops."""
    correct: int
    """Questions whose answer was generated."""
    questions: int
    mean_loops: float
    """Loops per generated token."""

    @property
    def accuracy(self) -> float:
        """Return the share of correct answers."""
        return self.correct / self.questions


@checked
def evaluate_answers(
    model: CausalLM,
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    depths: Sequence[int],
    *,
    exit_rule: ExitRule | None = None,
    max_new_tokens: int | None = None,
    slots: int = 16,
    progress: bool = False,
) -> list[AnswerRow]:
    """Generate greedy answers to all questions at each depth, shallowest first.

    A generated text counts if it equals the answer, surrounding white space apart; it ends at a
    line break unless an answer has several lines.

    Args:
        model: A looped model, or one without loops, for which a single row is returned.
        questions: What to ask.
        tokenizer: The model's tokenizer.
        depths: Most loops of a token, in any order; duplicates are ignored.
        exit_rule: Early-exit rule; no rule that uses predictions.
        max_new_tokens: Longest generated answer; by default that of the longest right one.
        slots: Questions that run at the same time.
        progress: Show a progress bar for each depth.

    Raises:
        ConfigError: A depth, the rule or a length is not possible.
        DataError: There are no questions.
    """
    if not questions:
        raise DataError(
            "nothing to evaluate on", where="questions", value="no questions",
            allowed="at least one", fix="check the file of questions",
        )  # fmt: skip
    wanted: list[int] | list[None] = [None]
    if hasattr(model, "recurrent"):
        wanted = sorted({check_count("depths", depth) for depth in depths})
    longest = max(len(tokenizer.encode(each.answer)) for each in questions) + 2
    stop = () if any("\n" in each.answer.strip() for each in questions) else ("\n",)
    end = tokenizer.eos_id if tokenizer.eos_id < model.cfg.vocab_size else None
    n_new = max_new_tokens or longest
    params = SamplingParams(n_new, temperature=0.0, stop=stop, eos_token_id=end)
    rows = []
    with evaluating(model):
        engine = Engine(model, slots=slots, max_loops=max(each or 0 for each in wanted) or None)
        for depth in wanted:
            done = engine.generate(
                [each.prompt for each in questions], params, Depth(depth, exit_rule),
                tokenizer=tokenizer, progress=progress,
            )  # fmt: skip
            texts = zip(done, questions, strict=True)
            correct = sum(_text(one.text) == _text(each.answer) for one, each in texts)
            loops = [t for one in done for t in one.loops]
            rows.append(AnswerRow(depth, correct, len(done), sum(loops) / max(len(loops), 1)))
    return rows


@checked
def read_questions(path: str | Path) -> list[Question]:
    """Read questions from a file of JSON lines: ``{"prompt": ..., "answer": ...}``.

    Raises:
        DataError: The file cannot be read, or a line is not a question.
    """
    try:
        lines = read_text(Path(path)).split("\n")  # other ends of lines are text in JSON
    except (OSError, ValueError) as error:
        raise DataError(
            "the questions cannot be read", where=str(path), value=str(error),
            allowed="a file of JSON lines", fix="name an existing file, in UTF-8",
        ) from error  # fmt: skip
    return [_question(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]


def _question(line: str, where: str) -> Question:
    try:
        given = json.loads(line)
    except (ValueError, RecursionError):
        given = None
    fields = ("prompt", "answer")
    texts = isinstance(given, dict) and all(isinstance(given.get(name), str) for name in fields)
    if not texts or not _text(given["answer"]):  # any silence would be right
        raise DataError(
            "not a question", where=where, value=line,
            allowed='an object with the texts "prompt" and "answer", which is not empty',
            fix="write one question per line",
        )  # fmt: skip
    return Question(given["prompt"], given["answer"])


def _text(text: str | None) -> str:
    return (text or "").strip()
