"""Derive the verdict from the accuracy and the loops of every exit rule, and plot it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from experiments.c4_halting import cells as c4
from experiments.claim import Record, Summary, verdict
from experiments.figure import COLOURS, MUTED, panels
from experiments.spread import by_arm, columns, mean_std, shown


@dataclass(frozen=True)
class Setting:
    """One setting of a rule on chains; numbers are means over seeds."""

    rule: str
    spec: str
    points: Sequence[dict[str, Any]]
    """Measurements, one per seed."""
    loops: float
    accuracy: float
    random: float
    """Accuracy of the same exits at random positions."""
    spearman: float
    """Rank correlation of loops with hops."""
    lost: float
    """Accuracy lost against full depth."""
    static_loops: float
    """Loops that static depth needs for the same accuracy."""

    @property
    def ratio(self) -> float:
        """Return the loops as a share of those of static depth."""
        return self.loops / self.static_loops

    @property
    def cheaper(self) -> bool:
        """Return whether the setting meets the pass mark and beats random exits for every seed."""
        beats_random = all(p["accuracy"] > p["random"]["accuracy"] for p in self.points)
        return self.lost <= c4.LOSE and self.ratio <= c4.CHEAPER and beats_random


def fewest_loops(static: Sequence[float], accuracy: float) -> int:
    """Return the fewest static loops that reach ``accuracy``, or the best accuracy there is."""
    wanted = min(accuracy, max(static))
    return next(loops for loops, each in enumerate(static, start=1) if each >= wanted)


def summarise(records: Sequence[Record]) -> Summary:
    """Compare every rule with static depth and random exits."""
    arms = by_arm(records)
    chains, act, text = arms[c4.CHAINS], arms[c4.ACT], arms[c4.TEXT]
    settings = _settings(chains)
    chosen = [_chosen(settings, rule) for rule in dict.fromkeys(each.rule for each in settings)]
    gates = (c4.REMAINING, c4.MARGINAL, c4.ALL_HOPS)
    learned = max((each for each in settings if each.rule in gates), key=lambda s: s.spearman)
    ordered = learned.spearman >= c4.ORDERED
    cheap = min(chosen, key=lambda each: (not each.cheaper, each.lost > c4.LOSE, each.ratio))
    return Summary(
        verdict(ordered and cheap.cheaper, ordered or cheap.cheaper),
        f"Loops follow hops with rho {learned.spearman:.2f} under the best gate ({learned.rule}, "
        f"{learned.spec}) and {max(each.spearman for each in settings):.2f} under the best rule "
        f"overall. {cheap.rule.capitalize()} ({cheap.spec}) answers {cheap.accuracy:.1%} with "
        f"{cheap.loops:.1f} loops, {cheap.lost:+.1%} lost; static depth needs "
        f"{cheap.static_loops:.1f} loops for the same accuracy ({cheap.ratio:.0%}), and the same "
        f"exits at random positions answer {cheap.random:.1%}. {_calibration(chains)} "
        f"{_oracle_sentence(chains)} {_act_sentence(act)} {_text_sentence(text)}",
        f"rho {learned.spearman:.2f} (gate); {cheap.ratio:.0%} of static loops at "
        f"{100 * cheap.lost:.1f} points lost",
        ("exit rule", "setting", "loops", "answered", "random exits", "static loops",
         "share of static", "rho", "computed", "time"),
        [*(_row(each, chains) for each in chosen), *_references(chains, act)],
        _plotted(settings, chosen, chains, text),
    )  # fmt: skip


def _settings(chains: Sequence[Record]) -> list[Setting]:
    static = [record.figures["static"] for record in chains]
    full = mean(each[-1] for each in static)
    found = []
    for points in zip(*(record.figures["points"] for record in chains), strict=True):
        accuracy = mean(point["accuracy"] for point in points)
        found.append(
            Setting(
                points[0]["rule"], points[0]["spec"], points,
                loops=mean(point["loops"] for point in points),
                accuracy=accuracy,
                random=mean(point["random"]["accuracy"] for point in points),
                spearman=mean(point["spearman"] for point in points),
                lost=full - accuracy,
                static_loops=mean(
                    fewest_loops(of_seed, point["accuracy"])
                    for point, of_seed in zip(points, static, strict=True)
                ),
            )
        )  # fmt: skip
    return found


def _chosen(settings: Sequence[Setting], rule: str) -> Setting:
    """Choose the shallowest setting that loses little, or else the most accurate one."""
    own = [each for each in settings if each.rule == rule]
    good = [each for each in own if each.lost <= c4.LOSE]
    if good:
        return min(good, key=lambda each: each.loops)
    return max(own, key=lambda each: each.accuracy)


def _calibration(chains: Sequence[Record]) -> str:
    gates = [record.figures["gates"][c4.REMAINING] for record in chains]
    known, unseen = (
        mean(gate["calibration"][part] for gate in gates) for part in ("trained", "unseen")
    )
    return (
        f"The gate trained on short chains has a calibration error of {known:.2f} on them and "
        f"{unseen:.2f} on longer ones; in the second of two consecutive chains it exits "
        f"{mean(gate['position_shift'] for gate in gates):.1f} loops later at equal hops; if it "
        "followed the position, this would be about six."
    )


def _oracle_sentence(chains: Sequence[Record]) -> str:
    first, *_, last = _means(chains, "oracle")
    return (
        f"Exiting as soon as the position's own answer is final, by an oracle, answers "
        f"{first['accuracy']:.0%}, {last['delay']:.0f} loops later {last['accuracy']:.1%}: later "
        "positions attend to the state at its exit."
    )


def _act_sentence(act: Sequence[Record]) -> str:
    few, *_, many = _means(act, "allowed")
    return (
        f"Trained end to end by ACT mixing: {few['accuracy']:.1%} with {few['allowed']:.0f} loops "
        f"allowed, {many['accuracy']:.1%} with {many['allowed']:.0f}, of which it uses "
        f"{many['loops']:.1f} (rho {many['spearman']:.2f}) without early exit; "
        f"{many['left']:.1%} with early exit."
    )


def _means(records: Sequence[Record], key: str) -> list[dict[str, float]]:
    """Average rows of metrics over seeds."""
    rows = zip(*(record.figures[key] for record in records), strict=True)
    return [{name: mean(each[name] for each in row) for name in row[0]} for row in rows]


def _text_sentence(text: Sequence[Record]) -> str:
    static = columns(record.figures["static"] for record in text)
    measured = list(_text_points(text))
    over_random = [
        mean_std([point["random"]["loss"] - point["loss"] for point in points])
        for points in measured
    ]
    best = max(range(len(measured)), key=lambda i: over_random[i][0])
    counts = over_random[best][0] > over_random[best][1]
    over_static = [
        mean_std([
            _between(record.figures["static"], point["loops"]) - point["loss"]
            for record, point in zip(text, points, strict=True)
        ])
        for points in measured
    ]  # fmt: skip
    cheapest = max(range(len(measured)), key=lambda i: over_static[i][0])
    return (
        f"On text the best static depth is {1 + static.index(min(static))} loops "
        f"({min(static):.4f} nats per byte; one loop {static[0]:.4f}). "
        f"{_named(measured[best])} is {shown(over_random[best])} ahead of its own exits at random "
        f"positions, {'more' if counts else 'no more'} than one deviation, the most of all; "
        f"against a static depth of as many loops the most is {shown(over_static[cheapest])} "
        f"({_named(measured[cheapest])})."
    )


def _named(points: Sequence[dict[str, Any]]) -> str:
    loops = mean(point["loops"] for point in points)
    return f"{points[0]['rule']} ({points[0]['spec']}, {loops:.1f} loops)"


def _between(static: Sequence[float], loops: float) -> float:
    """Return the loss of a static depth, on a line between whole numbers of loops."""
    return float(np.interp(loops, range(1, len(static) + 1), static))


def _text_points(text: Sequence[Record]) -> list[tuple[dict[str, Any], ...]]:
    """Return the measurements of every setting, one per seed."""
    return list(zip(*(record.figures["points"] for record in text), strict=True))


def _row(setting: Setting, chains: Sequence[Record]) -> tuple[str, ...]:
    seconds = [record.figures["seconds"] for record in chains]
    times = [each[setting.rule] / each["full"] for each in seconds if setting.rule in each]
    return (
        setting.rule, setting.spec, f"{setting.loops:.1f}",
        shown(mean_std([point["accuracy"] for point in setting.points]), 3),
        f"{setting.random:.3f}", f"{setting.static_loops:.1f}",
        f"{setting.ratio:.0%}", f"{setting.spearman:.2f}",
        f"{mean(point['computed'] for point in setting.points):.0%}",
        f"{mean(times):.0%}" if times else "-",
    )  # fmt: skip


def _references(chains: Sequence[Record], act: Sequence[Record]) -> list[tuple[str, ...]]:
    """Return the table rows of full depth, the oracle and ACT."""
    static = [record.figures["static"] for record in chains]
    full, deepest = shown(mean_std([each[-1] for each in static]), 3), len(static[0])
    return [
        ("static depth", f"{deepest} loops", f"{deepest}.0", full, *["-"] * 4, "100%", "100%"),
        *(
            ("oracle", f"{row['delay']:.0f} loops later", f"{row['loops']:.1f}",
             f"{row['accuracy']:.3f}", *["-"] * 6)
            for row in _means(chains, "oracle")
        ),
        *(
            ("ACT mixing", f"{row['allowed']:.0f} allowed", f"{row['loops']:.1f}",
             f"{row['accuracy']:.3f}", *["-"] * 3, f"{row['spearman']:.2f}", "-", "-")
            for row in _means(act, "allowed")
        ),
    ]  # fmt: skip


def _plotted(
    settings: Sequence[Setting], chosen: Sequence[Setting], chains: Sequence[Record],
    text: Sequence[Record],
) -> dict[str, Any]:  # fmt: skip
    """Return the means over seeds that the plot shows."""
    curves: dict[str, list[tuple[float, float]]] = {}
    text_curves: dict[str, list[tuple[float, float]]] = {}
    for each in settings:
        curves.setdefault(each.rule, []).append((each.loops, each.accuracy))
    for points in _text_points(text):
        at = (mean(p["loops"] for p in points), mean(p["loss"] for p in points))
        text_curves.setdefault(points[0]["rule"], []).append(at)
    return {
        "rules": curves,
        "random": [(each.loops, each.random) for each in settings],
        "static": columns(record.figures["static"] for record in chains),
        "oracle": [(each["loops"], each["accuracy"]) for each in _means(chains, "oracle")],
        "by_hop": {
            f"{each.rule} ({each.spec})": columns(p["loops_by_hop"] for p in each.points)
            for each in chosen
        },
        "text": {
            "static": columns(record.figures["static"] for record in text), "rules": text_curves
        },
    }  # fmt: skip


def plot(summary: Summary, path: Path) -> None:
    """Plot ``summary.data`` to ``path``."""
    data = summary.data
    with panels(path, 3) as (quality, depth, text):
        _curve(quality, list(enumerate(data["static"], start=1)), "static depth", "black", "-")
        for (rule, points), colour in zip(data["rules"].items(), COLOURS, strict=False):
            _curve(quality, points, rule, colour, "o-")
        _curve(quality, data["random"], "the same exits at random", MUTED, "x")
        _curve(quality, data["oracle"], "oracle, delayed", MUTED, "D--")
        quality.set(title="Chains of 1 to 10 hops", xlabel="mean loops", ylabel="answered")
        quality.legend(fontsize=8)
        for (rule, loops), colour in zip(data["by_hop"].items(), COLOURS, strict=False):
            depth.plot(range(1, len(loops) + 1), loops, "o-", ms=3, color=colour, label=rule)
        depth.set(title="Harder questions run deeper", xlabel="hops asked", ylabel="loops run")
        depth.legend(fontsize=8)
        _curve(text, list(enumerate(data["text"]["static"], start=1)), "static depth", "black", "-")
        for (rule, points), colour in zip(
            data["text"]["rules"].items(), (*COLOURS[:2], *COLOURS[3:]), strict=False
        ):
            _curve(text, points, rule, colour, "o-")
        text.set(title="Text", xlabel="mean loops", ylabel="nats per byte")


def _curve(
    axes: Any, points: Sequence[tuple[float, float]], label: str, colour: str, style: str
) -> None:
    loops, quality = zip(*sorted(points), strict=True)
    axes.plot(loops, quality, style, color=colour, label=label, ms=4)
