"""From what every rule kept and saved to the verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from experiments.c4_halting.cells import (
    ACT,
    ALL_HOPS,
    CHAINS,
    CHEAPER,
    LOSE,
    MARGINAL,
    ORDERED,
    REMAINING,
    TEXT,
)
from experiments.claim import Record, Summary, verdict
from experiments.spread import by_arm, mean_std, shown

GATES = (REMAINING, MARGINAL, ALL_HOPS)


@dataclass(frozen=True)
class Setting:
    """One setting of a rule on chains, over all seeds."""

    rule: str
    spec: str
    points: list[dict[str, Any]]
    """What came, a seed each."""
    static: list[list[float]]
    """Accuracy with 1, 2, ... loops for everybody, of the same seeds."""

    def over(self, figure: Callable[[dict[str, Any]], float]) -> float:
        """Mean over seeds."""
        return mean(figure(point) for point in self.points)

    @property
    def loops(self) -> float:
        """Mean loops of a position."""
        return self.over(lambda point: point["loops"])

    @property
    def accuracy(self) -> float:
        """Share of the questions answered."""
        return self.over(lambda point: point["accuracy"])

    @property
    def spearman(self) -> float:
        """Of loops against hops."""
        return self.over(lambda point: point["spearman"])

    @property
    def lost(self) -> float:
        """Accuracy lost against full depth."""
        return mean(static[-1] for static in self.static) - self.accuracy

    @property
    def static_loops(self) -> float:
        """Loops that everybody needs for the same accuracy."""
        pairs = zip(self.points, self.static, strict=True)
        return mean(fewest_loops(static, point["accuracy"]) for point, static in pairs)

    @property
    def ratio(self) -> float:
        """Loops as a share of those of static depth."""
        return self.loops / self.static_loops

    @property
    def beats_random(self) -> bool:
        """Whether it answers more than its own exits at random, in every seed."""
        return all(point["accuracy"] > point["random"]["accuracy"] for point in self.points)

    @property
    def cheaper(self) -> bool:
        """Whether it meets the pass mark."""
        return self.lost <= LOSE and self.ratio <= CHEAPER and self.beats_random


def fewest_loops(static: Sequence[float], accuracy: float) -> int:
    """Loops for everybody that reach ``accuracy``, or the best there is if nothing does."""
    wanted = min(accuracy, max(static))
    return next(loops for loops, each in enumerate(static, start=1) if each >= wanted)


def summarise(records: Sequence[Record]) -> Summary:
    """What each rule keeps at which depth, and the verdict."""
    arms = by_arm(records)
    chains = arms[CHAINS]
    settings = _settings(chains)
    chosen = [_chosen(settings, rule) for rule in dict.fromkeys(each.rule for each in settings)]
    learned = max((each for each in settings if each.rule in GATES), key=lambda s: s.spearman)
    ordered = learned.spearman >= ORDERED
    cheap = min(chosen, key=lambda each: (not each.cheaper, each.lost > LOSE, each.ratio))
    return Summary(
        verdict(ordered and cheap.cheaper, ordered or cheap.cheaper),
        f"Loops follow hops with rho {learned.spearman:.2f} under the best gate ({learned.rule}, "
        f"{learned.spec}) and {max(each.spearman for each in settings):.2f} under the best rule of "
        f"all. {cheap.rule.capitalize()} ({cheap.spec}) answers {cheap.accuracy:.1%} with "
        f"{cheap.loops:.1f} loops, {cheap.lost:+.1%} lost; static depth needs "
        f"{cheap.static_loops:.1f} for as much ({cheap.ratio:.0%}), and the same exits at random "
        f"answer {cheap.over(lambda p: p['random']['accuracy']):.1%}. {_beyond(chains)} "
        f"{_frozen(chains)} {_act(arms[ACT])} {_text(arms[TEXT])}",
        f"rho {learned.spearman:.2f} (gate); {cheap.ratio:.0%} of static loops at "
        f"{100 * cheap.lost:.1f} points lost",
        ("depth decided by", "setting", "loops", "answered", "random exits", "static loops",
         "share of static", "rho", "computed", "time"),
        [*(_row(each, chains) for each in chosen), *_references(chains, arms[ACT])],
        _drawn(settings, chosen, chains, arms[TEXT]),
    )  # fmt: skip


def _settings(chains: Sequence[Record]) -> list[Setting]:
    static = [record.figures["static"] for record in chains]
    per_seed = zip(*(record.figures["points"] for record in chains), strict=True)
    return [Setting(each[0]["rule"], each[0]["spec"], list(each), static) for each in per_seed]


def _chosen(settings: Sequence[Setting], rule: str) -> Setting:
    """The shallowest setting that loses little; the most accurate where none does."""
    own = [each for each in settings if each.rule == rule]
    good = [each for each in own if each.lost <= LOSE]
    if good:
        return min(good, key=lambda each: each.loops)
    return max(own, key=lambda each: each.accuracy)


def _beyond(chains: Sequence[Record]) -> str:
    """How the gate that saw short chains does on long ones."""
    known, unseen = (
        mean(record.figures["gates"][REMAINING]["calibration"][part] for record in chains)
        for part in ("trained", "unseen")
    )
    shift = mean(record.figures["gates"][REMAINING]["position_shift"] for record in chains)
    return (
        f"The gate trained on short chains has a calibration error of {known:.2f} on them and "
        f"{unseen:.2f} on longer ones; in the second of two chains in a row it leaves {shift:.1f} "
        "loops later at equal hops, where following the position would make it about six."
    )


def _frozen(chains: Sequence[Record]) -> str:
    """What the oracle says about leaving at once."""
    first, last = (_oracle(chains, at) for at in (0, -1))
    return (
        f"Leaving as soon as the own answer is right for good, by an oracle, answers "
        f"{first['accuracy']:.0%}, {last['delay']:.0f} loops later {last['accuracy']:.1%}: those "
        "behind read a state as it was left."
    )


def _oracle(chains: Sequence[Record], at: int) -> dict[str, float]:
    rows = [record.figures["oracle"][at] for record in chains]
    return {key: mean(row[key] for row in rows) for key in ("delay", "loops", "accuracy")}


def _act(act: Sequence[Record]) -> str:
    few, many = (_allowed(act, at) for at in (0, -1))
    return (
        f"Trained end to end by ACT mixing: {few['accuracy']:.1%} with {few['allowed']:.0f} loops "
        f"allowed, {many['accuracy']:.1%} with {many['allowed']:.0f}, of which it takes "
        f"{many['loops']:.1f} (rho {many['spearman']:.2f}) while nobody leaves; "
        f"{many['left']:.1%} if they are really left."
    )


def _allowed(act: Sequence[Record], at: int) -> dict[str, float]:
    """Means over seeds of what the mixture did with one number of loops allowed."""
    found = [record.figures["allowed"][at] for record in act]
    return {key: mean(each[key] for each in found) for key in found[0]}


def _text(text: Sequence[Record]) -> str:
    static = _mean_static(text)
    gains = [
        mean(point["random"]["loss"] - point["loss"] for point in each)
        for each in _text_points(text)
    ]
    return (
        f"On text the best static depth is {1 + static.index(min(static))} loops "
        f"({min(static):.4f} nats per byte; one loop {static[0]:.4f}), and no rule is better than "
        f"its own exits at random by more than {max(gains):.4f}."
    )


def _text_points(text: Sequence[Record]) -> list[tuple[dict[str, Any], ...]]:
    """Every setting, a point for each seed."""
    return list(zip(*(record.figures["points"] for record in text), strict=True))


def _mean_static(records: Sequence[Record]) -> list[float]:
    return [mean(each) for each in zip(*(r.figures["static"] for r in records), strict=True)]


def _row(setting: Setting, chains: Sequence[Record]) -> tuple[str, ...]:
    seconds = [record.figures["seconds"] for record in chains]
    times = [each[setting.rule] / each["full"] for each in seconds if setting.rule in each]
    return (
        setting.rule, setting.spec, f"{setting.loops:.1f}",
        shown(mean_std([point["accuracy"] for point in setting.points]), 3),
        f"{setting.over(lambda p: p['random']['accuracy']):.3f}", f"{setting.static_loops:.1f}",
        f"{setting.ratio:.0%}", f"{setting.spearman:.2f}",
        f"{setting.over(lambda p: p['computed']):.0%}", f"{mean(times):.0%}" if times else "-",
    )  # fmt: skip


def _references(chains: Sequence[Record], act: Sequence[Record]) -> list[tuple[str, ...]]:
    """Full depth, the oracle, and the model trained by ACT, in the columns of the table."""
    static = [record.figures["static"] for record in chains]
    full = shown(mean_std([each[-1] for each in static]), 3)
    deepest = len(static[0])
    rows = [
        ("static depth", f"{deepest} loops", f"{deepest}.0", full, *["-"] * 4, "100%", "100%")
    ]  # fmt: skip
    for at in range(len(chains[0].figures["oracle"])):
        told = _oracle(chains, at)
        after = f"{told['delay']:.0f} loops later"
        accuracy = f"{told['accuracy']:.3f}"
        rows.append(("oracle", after, f"{told['loops']:.1f}", accuracy, *["-"] * 6))
    for at in range(len(act[0].figures["allowed"])):
        mixed = _allowed(act, at)
        rows.append(
            ("ACT mixing", f"{mixed['allowed']:.0f} allowed", f"{mixed['loops']:.1f}",
             f"{mixed['accuracy']:.3f}", *["-"] * 3, f"{mixed['spearman']:.2f}", "-", "-")
        )  # fmt: skip
    return rows


def _drawn(
    settings: Sequence[Setting], chosen: Sequence[Setting], chains: Sequence[Record],
    text: Sequence[Record],
) -> dict[str, Any]:  # fmt: skip
    """Means over seeds, for the picture."""
    curves: dict[str, list[tuple[float, float]]] = {}
    random, prose = list[tuple[float, float]](), dict[str, list[tuple[float, float]]]()
    for each in settings:
        curves.setdefault(each.rule, []).append((each.loops, each.accuracy))
        random.append((each.loops, each.over(lambda p: p["random"]["accuracy"])))
    for points in _text_points(text):
        at = (mean(p["loops"] for p in points), mean(p["loss"] for p in points))
        prose.setdefault(points[0]["rule"], []).append(at)
    oracle = [_oracle(chains, at) for at in range(len(chains[0].figures["oracle"]))]
    return {
        "rules": curves,
        "random": random,
        "static": _mean_static(chains),
        "oracle": [(each["loops"], each["accuracy"]) for each in oracle],
        "by_hop": {
            f"{each.rule} ({each.spec})": [
                mean(loops) for loops in zip(*(p["loops_by_hop"] for p in each.points), strict=True)
            ]
            for each in chosen
        },
        "text": {"static": _mean_static(text), "rules": prose},
    }
