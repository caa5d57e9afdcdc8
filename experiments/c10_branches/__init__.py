"""C10: does a state hold several open branches of a search at once?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.c10_branches.branches import MANY, at_once, by_distance, look, probes
from experiments.c10_branches.distance_recipe import (
    RATE,
    STEPS,  # noqa: F401 (named in claim.yaml)
    TASK,
    TRAINED_LOOPS,
    graphs,
    recipe,
    untrained,
)
from experiments.claim import (
    QUICK,
    Cell,
    Claim,
    Place,
    Record,
    Summary,
    arms_by_seed,
    sweep,
    verdict,
)
from experiments.figure import COLOURS, MUTED, lines, log2_ticks, panels
from experiments.spread import at_depth, by_arm, columns, share
from experiments.tasks.saved import keep
from experiments.training import costs, fit, run_of
from open_mythos.model.mythos import OpenMythos

LOOPS = (1, 2, 3, 4, 5, 6, 7, TRAINED_LOOPS, 12, 16, 32)
DISTANCES = range(TASK.farthest + 1)
JUDGED = TASK.farthest - 2
"""Farthest distance of the verdict; beyond it few graphs have many nodes."""
BLOCKS = 2
UNROLLED = BLOCKS * TRAINED_LOOPS
FOUND, SELECTIVE, ALL_RIGHT, LATER = 0.9, 0.3, 0.9, 1.0
LEARNT = 0.9
LOOPED, UNTRAINED = "looped", "untrained"
_ASKED = 4096

CLAIM = Claim.read(__file__, vars())
_ARMS: dict[str, dict[str, Any]] = {
    LOOPED: {"seeds": 2},
    UNTRAINED: {"train": False},
    "dense": {"dense": True},
    "dense-lr1e-2": {"dense": True, "lr": 1e-2},
    "dense-equal-flops": {"dense": True, "times": TRAINED_LOOPS},
    f"dense-{UNROLLED}-blocks": {"dense": True, "unrolled": TRAINED_LOOPS},
}


def cells(scale: str) -> list[Cell]:
    """Return every arm with its seeds, one seed after the other."""
    if scale == QUICK:
        return sweep({LOOPED: _settings(scale), "dense": _settings(scale, dense=True)}, [0])
    return arms_by_seed(_ARMS, partial(_settings, scale))


def _settings(
    scale: str, *, dense: bool = False, lr: float = RATE, times: int = 1,
    unrolled: int | None = None, train: bool = True,
) -> dict[str, Any]:  # fmt: skip
    quick = scale == QUICK
    run = recipe(quick=quick, lr=lr)
    run.architecture = "dense" if dense else "looped"
    run.train.steps *= times
    values = run.to_dict()
    del values["train"]["seed"], values["data"]
    return {"run": values, "unrolled": unrolled, "train": train, "loops": list(LOOPS),
            "asked": 200 if quick else _ASKED}  # fmt: skip


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Train the arm, ask it at every number of loops, and probe a looped one."""
    s, run = cell.settings, run_of(cell)
    model = untrained(run, unrolled=s["unrolled"])
    curve = fit(model, graphs(run), run)["loss"] if s["train"] else []
    asked = TASK.graphs(0, s["asked"], "test")
    found = look(model, TASK, asked, s["loops"])
    figures = {
        **costs(model, run, tokens=None if s["train"] else 0),
        "right": by_distance(found, asked, TASK),
        "whole": [float((r | (asked.distance == 0)).all(1).mean()) for r in found.right],
        "curve": curve,
    }
    if isinstance(model, OpenMythos):
        if s["train"]:
            keep(model, TASK, place.models / cell.name)
        figures["at_once"] = at_once(found, asked, TASK)
        figures["probes"] = probes(found, asked, TASK, seed=cell.seed)
    return figures


def right(distance: int, loops: int = TRAINED_LOOPS) -> Any:
    """Return the metric of the share of nodes at ``distance`` named right; 0 is out of reach."""

    def of(record: Record) -> float:
        return _at(record.figures["right"][distance], record, loops)

    return of


def whole(loops: int = TRAINED_LOOPS) -> Any:
    """Return the metric of the share of graphs whose nodes are all named right."""

    def of(record: Record) -> float:
        return _at(record.figures["whole"], record, loops)

    return of


def _at(row: list[float], record: Record, loops: int) -> float:
    return at_depth(row, record.settings["loops"], loops)


def _probe(found: Sequence[Record], key: str, loops: int = TRAINED_LOOPS) -> float:
    place = LOOPS.index(loops)
    return mean(record.figures["probes"][place][key] for record in found)


def _branches(found: Sequence[Record]) -> dict[str, tuple[float, float]]:
    """Return per distance: share of many branches all right, and how many loops later than one."""
    of = [record.figures["at_once"] for record in found]
    place = LOOPS.index(TRAINED_LOOPS)
    return {
        d: (
            mean(each[d]["many"]["all_right"][place] for each in of),
            mean(each[d]["many"]["loops"] - each[d]["one"]["loops"] for each in of),
        )
        for d in of[0]
    }


def summarise(records: Sequence[Record]) -> Summary:
    """Judge the probes, and whether many branches need more loops than one."""
    arms = by_arm(records)
    looped = arms[LOOPED]
    accuracy, control = _probe(looped, "accuracy"), _probe(looped, "control")
    raw = _probe(arms[UNTRAINED], "accuracy")
    branches = _branches(looped)
    held = {d: values for d, values in branches.items() if int(d) <= JUDGED}
    together = all(values[0] >= ALL_RIGHT for values in held.values())
    no_later = all(values[1] <= LATER for values in held.values())
    decodable = accuracy >= FOUND and accuracy - max(control, raw) >= SELECTIVE
    known = mean(map(right(1), looped))
    text = "; ".join(f"distance {d}: {a:.1%}, {b:+.2f} loops" for d, (a, b) in branches.items())
    dense = {arm: mean(map(whole(), found)) for arm, found in arms.items() if "dense" in arm}
    best = max(dense, key=lambda arm: dense[arm])
    return Summary(
        verdict(
            decodable and together and no_later, decodable or (together and no_later),
            unclear="" if known >= LEARNT else "the nodes next to the source were not learnt",
        ),
        f"At {TRAINED_LOOPS} loops a probe of an edge's state finds the distance of its tail with "
        f"an accuracy of {accuracy:.1%} (shuffled labels {control:.1%}, untrained model {raw:.1%}; "
        f"after one loop {_probe(looped, 'accuracy', 1):.1%}, after two "
        f"{_probe(looped, 'accuracy', 2):.1%}). How many graphs with {MANY} or more "
        f"nodes at a distance have all of them right, and how much later than graphs with one: "
        f"{text}. All {TASK.nodes} nodes of a graph are right in "
        f"{mean(map(whole(), looped)):.1%} of the graphs, in {dense[best]:.1%} for the best dense "
        f"arm ({best}).",
        f"probe {accuracy:.1%}, shuffled {control:.1%}; graphs {mean(map(whole(), looped)):.1%}, "
        f"dense {dense[best]:.1%}",
        ("arm", "seeds", "parameters", "training FLOPs", "loops", "whole graph", "out of reach",
         *(f"distance {d}" for d in DISTANCES[1:])),
        [row for arm, found in arms.items() for row in _rows(arm, found)],
        {"loops": list(LOOPS),
         "right": [columns(r.figures["right"][d] for r in looped) for d in DISTANCES],
         "probes": {name: [_probe(found, key, n) for n in LOOPS] for name, found, key in (
             ("trained", looped, "accuracy"), ("untrained", arms[UNTRAINED], "accuracy"),
             ("shuffled labels", looped, "control"))},
         "at_once": {f"distance {d}, {name}": columns(
             r.figures["at_once"][d][name]["all_right"] for r in looped)
             for d in held for name in ("one", "many")}},
    )  # fmt: skip


def plot(summary: Summary, path: Path) -> None:
    """Plot answers, probes, and one branch beside many, over the loops."""
    data = summary.data
    with panels(path, 3) as (answers, probed, together):
        named = {f"distance {d}" if d else "out of reach": data["right"][d] for d in DISTANCES}
        lines(answers, data["loops"], named, small=True)
        answers.set(title="Nodes named right", ylabel="share")
        lines(probed, data["loops"], data["probes"], small=True)
        probed.set(title="Probe of an edge: distance of its tail", ylabel="accuracy")
        for i, (name, row) in enumerate(data["at_once"].items()):
            together.plot(
                data["loops"], row, "--o" if i % 2 else "-", ms=3, color=(COLOURS * 2)[i // 2],
                label=name.replace("many", f"{MANY} or more nodes").replace("one", "one node"),
            )  # fmt: skip
        together.axhline(ALL_RIGHT, color=MUTED, ls=":")
        together.legend(fontsize=7)
        together.set(title="All nodes at a distance right", ylabel="graphs")
        for axes in (answers, probed, together):
            log2_ticks(axes, data["loops"])
            axes.set(xlabel="loops", ylim=(0, 1.03))


def _rows(arm: str, found: Sequence[Record]) -> list[tuple[str, ...]]:
    first = found[0].figures
    depths = (2, 4, TRAINED_LOOPS, 16, LOOPS[-1]) if arm == LOOPED else (TRAINED_LOOPS,)
    return [
        (
            arm, str(len(found)), f"{first['parameters']:,}", f"{first['training_flops']:.1e}",
            "-" if arm.startswith("dense") else str(loops),
            share(found, whole(loops)),
            *(share(found, right(d, loops)) for d in DISTANCES),
        )
        for loops in depths
    ]  # fmt: skip
