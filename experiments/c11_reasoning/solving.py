"""A claim on puzzles: looped against dense models, by loops and by difficulty."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.c11_reasoning.exits import measure_gate
from experiments.claim import QUICK, Cell, Place, Record, Summary, arms_by_seed, sweep, verdict
from experiments.figure import COLOURS, lines, log2_ticks, panels
from experiments.spread import Metric, at_depth, by_arm, columns, over_seeds, share
from experiments.tasks import TaskLoader
from experiments.tasks.maze import Maze
from experiments.tasks.puzzle import answers
from experiments.tasks.saved import keep
from experiments.tasks.sudoku import Sudoku
from experiments.training import build, costs, fit, run_of
from open_mythos.model.mythos import OpenMythos
from open_mythos.train import RunConfig
from open_mythos.train.build import Model

LOOPED = "looped"
SHALLOW = 4


def at_random(run: RunConfig, _task: Any, *, unrolled: int | None = None) -> Model:
    """Build the model of an arm with the usual random embedding."""
    return build(run, unrolled=unrolled)


@dataclass(frozen=True)
class PuzzleClaim:
    """The arms of a claim on puzzles, how they are asked, and its mark.

    Attributes:
        name: Name of the puzzles, for the figure.
        task: The puzzles.
        recipe: Run of an arm, from ``lr`` and ``quick``.
        arms: Arm -> "seeds", and what is special: "dense", "unrolled" (as deep as so many loops),
            "times" (as many steps), "lr", "random_start", or fields of the "task" in training. One
            is "looped".
        levels: Levels of difficulty, see :meth:`Questions.level`.
        hard: The level that decides, and what its puzzles need.
        needs: What the levels count.
        trained: Loops of training that are shown.
        chosen: Loops of the verdict.
        loops: Loops at which puzzles are asked, rising.
        asked: Number of test puzzles.
        gate_asked: Most test puzzles of each level that are solved with the gate; None for all.
        ahead: Percentage points by which the looped model has to be ahead.
        learnt: Share of the easiest puzzles that it has to solve.
        untrained: Builds the model of an arm from run, task and ``unrolled``.
    """

    name: str
    task: Sudoku | Maze
    recipe: Callable[..., RunConfig]
    arms: Mapping[str, Mapping[str, Any]]
    levels: tuple[str, ...]
    hard: tuple[str, str]
    needs: str
    trained: int
    chosen: int
    loops: tuple[int, ...]
    asked: int
    ahead: float
    learnt: float
    untrained: Callable[..., Model] = at_random
    gate_asked: int | None = None

    @property
    def asked_levels(self) -> tuple[str, ...]:
        """Return all levels that are measured."""
        return tuple(dict.fromkeys((*self.levels, self.hard[0])))

    @property
    def equal(self) -> list[str]:
        """Return the dense arms of equal parameters."""
        return [arm for arm in self.rivals if "unrolled" not in self.arms[arm]]

    @property
    def rivals(self) -> list[str]:
        """Return the dense arms, trained on the same puzzles."""
        return [arm for arm, about in self.arms.items()
                if about.get("dense") and "task" not in about]  # fmt: skip

    @property
    def _of_gate(self) -> str:
        most = self.gate_asked
        return "all puzzles" if most is None else f"up to {most} puzzles of each difficulty"

    def cells(self, scale: str) -> list[Cell]:
        """Return every arm with its seeds, one seed after the other."""
        if scale == QUICK:
            looped, dense = (self._settings(scale, dense=dense) for dense in (False, True))
            return sweep({LOOPED: looped, "dense": dense}, [0])
        return arms_by_seed(self.arms, partial(self._settings, scale))

    def _settings(
        self, scale: str, *, dense: bool = False, times: int = 1, unrolled: int | None = None,
        random_start: bool = False, task: Mapping[str, Any] | None = None, **of_recipe: float,
    ) -> dict[str, Any]:  # fmt: skip
        quick = scale == QUICK
        run = self.recipe(quick=quick, **of_recipe)
        run.architecture = "dense" if dense else "looped"
        run.train.steps *= times
        if scale == "gpu":
            run.train.device = "cuda"
        gate = (
            {"rows": 2, "positions": 64, "steps": 2} if quick
            else {"rows": 256, "positions": 4096, "steps": 600}
        )  # fmt: skip
        if self.gate_asked is not None:
            gate["asked"] = self.gate_asked
        puzzles = replace(self.task.prolonged(times), **(task or {}))
        if quick:
            puzzles = replace(puzzles, pool=4)
        start_at_random = random_start or self.untrained is at_random
        return {"run": run.to_dict(), "task": asdict(puzzles), "random_start": start_at_random,
                "unrolled": unrolled, "loops": list(self.loops),
                "asked": 60 if quick else self.asked, "gate": None if dense else gate}  # fmt: skip

    def run_cell(self, cell: Cell, place: Place) -> dict[str, Any]:
        """Train the arm and ask it at every number of loops; train a gate on a looped one."""
        run, s = run_of(cell), cell.settings
        task = type(self.task)(**s["task"])
        untrained = at_random if s["random_start"] else self.untrained
        model = untrained(run, task, unrolled=s["unrolled"])
        curves = fit(model, TaskLoader(task, global_batch=run.train.global_batch), run)
        questions = task.questions(s["asked"])
        found = answers(model, questions.ids, s["loops"], task)
        figures = {
            **costs(model, run),
            "asked": {level: len(questions.level(level)) for level in self.asked_levels},
            "solved": {level: found.solved(questions, level) for level in self.asked_levels},
            "cells": found.cells(questions, self.hard[0]),
            "curve": curves["loss"],
        }
        if isinstance(model, OpenMythos):
            figures["example"] = found.example(questions, self.trained, self.chosen)
            keep(model, task, place.models / cell.name)
            gate = dict(s["gate"])
            if most := gate.pop("asked", None):
                questions = questions.at_most(most, self.levels)
            figures["exits"] = measure_gate(
                model, task, questions, cell.seed, self.asked_levels, self.chosen, **gate
            )
        return figures

    def solved(self, level: str = "", loops: int | None = None) -> Metric:
        """Return the metric of the share solved, of the hard ones without ``level``.

        A dense model has no loops.
        """

        def of(record: Record) -> float:
            values = record.figures["solved"][level or self.hard[0]]
            return at_depth(values, record.settings["loops"], loops or self.chosen)

        return of

    def _mean(self, found: Sequence[Record], level: str = "", loops: int | None = None) -> float:
        return over_seeds(found, self.solved(level, loops))[0]

    def summarise(self, records: Sequence[Record]) -> Summary:
        """Compare the looped model with every dense arm on the hard puzzles."""
        arms = by_arm(records)
        looped = arms[LOOPED]
        deep, learnt = self._mean(looped), self._mean(looped, self.levels[0])
        dense = {arm: self._mean(arms[arm]) for arm in self.rivals if arm in arms}
        equal = max(dense[arm] for arm in self.equal if arm in dense)
        best = max(dense, key=lambda arm: dense[arm])
        exits = self._exits(looped)
        by_level = ", ".join(f"{loops:.1f}" for loops in exits["loops"].values())
        at = {loops: f"{self._mean(looped, loops=loops):.1%}" for loops in self.loops}
        return Summary(
            verdict(
                100 * (deep - dense[best]) >= self.ahead, 100 * (deep - equal) >= self.ahead,
                unclear="" if learnt >= self.learnt else "easy puzzles were not learnt",
            ),
            f"Of the puzzles that need {self.hard[1]} the looped model solves {at[SHALLOW]} with "
            f"{SHALLOW} loops, {at[self.trained]} with {self.trained}, {at[self.chosen]} with "
            f"{self.chosen} and {at[self.loops[-1]]} with {self.loops[-1]}; the best dense arm of "
            f"equal parameters {equal:.1%}, the best of all ({best}) {dense[best]:.1%}. With a "
            f"trained gate it solves {exits['solved']:.1%} of {self._of_gate} with "
            f"{exits['mean']:.1f} loops on average ({exits['full']:.1%} with {self.chosen}) in "
            f"{exits['time']:.0%} of the time; by difficulty the loops are {by_level}.",
            f"{self.hard[1]}: {at[self.chosen]} at {self.chosen} loops, dense {equal:.1%} (equal "
            f"parameters), {dense[best]:.1%} (best of all)",
            ("arm", "seeds", "parameters", "training FLOPs", "loops",
             *(f"{level} ({looped[0].figures['asked'][level]})" for level in self.asked_levels)),
            [row for arm, found in arms.items() for row in self._rows(arm, found)],
            {"grid": [columns(r.figures["solved"][level] for r in looped) for level in self.levels],
             "dense": {arm: [self._mean(arms[arm], level) for level in self.levels]
                       for arm in dense},
             "exits": exits},
        )  # fmt: skip

    def _rows(self, arm: str, found: Sequence[Record]) -> list[tuple[str, ...]]:
        first = found[0].figures
        depths = [SHALLOW, self.trained, self.chosen, self.loops[-1]]
        return [
            (
                arm, str(len(found)), f"{first['parameters']:,}", f"{first['training_flops']:.1e}",
                "-" if self.arms[arm].get("dense") else str(loops),
                *(share(found, self.solved(level, loops)) for level in self.asked_levels),
            )
            for loops in (depths if arm == LOOPED else [self.chosen])
        ]  # fmt: skip

    def _exits(self, looped: Sequence[Record]) -> dict[str, Any]:
        """Return the means over seeds of what the gate does."""
        found = [record.figures["exits"] for record in looped]
        return {
            "loops": {level: mean(each["by_level"][level] for each in found)
                      for level in self.levels},
            "mean": mean(each["loops"] for each in found),
            "solved": mean(each["solved"] for each in found),
            "full": mean(each["solved_full"] for each in found),
            "time": mean(each["seconds"] / each["seconds_full"] for each in found),
        }  # fmt: skip

    def plot(self, summary: Summary, path: Path) -> None:
        """Plot the share solved over loops, all arms over difficulty, and loops under the gate."""
        with panels(path, 3) as axes:
            self.draw(summary, axes)

    def draw(self, summary: Summary, axes: Sequence[Any]) -> None:
        """Draw the three parts of :meth:`plot`."""
        data, (grid, arms, exits) = summary.data, axes
        lines(grid, self.loops, dict(zip(self.levels, data["grid"], strict=True)), small=True)
        log2_ticks(grid, self.loops)
        grid.set(title=f"{self.name}: same weights, more loops", xlabel="loops",
                 ylabel="puzzles solved", ylim=(0, 1.03))  # fmt: skip
        place = self.loops.index(self.chosen)
        shown = {f"looped, {self.chosen} loops": [row[place] for row in data["grid"]]}
        lines(arms, range(len(self.levels)), shown | data["dense"], small=True)
        arms.set_xticks(range(len(self.levels)), self.levels, fontsize=8)
        arms.set(title="Looped and dense models by difficulty", xlabel=self.needs, ylim=(0, 1.03))
        exits.bar(self.levels, list(data["exits"]["loops"].values()), color=COLOURS[0])
        exits.tick_params(axis="x", labelsize=8)
        exits.set(title="Loops per cell under the gate", xlabel=self.needs)
