"""From losses and routing to the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.c9_looped_experts.cells import DISJOINT, EXPERTS, LOOPS, TIED, UNBALANCED, arm
from experiments.claim import Record, Summary, verdict
from experiments.figure import COLOURS, MUTED, panels
from experiments.spread import by_arm, each, mean_std, minus, over_seeds, shown

_DEEPEST = LOOPS[-1]


def summarise(records: Sequence[Record]) -> Summary:
    """What loops gain with and without experts, what routing does, and the verdict."""
    arms = by_arm(records)
    gains = {experts: _gains(arms, experts) for experts in EXPERTS}
    more = {experts: minus(gains[experts], gains[1]) for experts in EXPERTS[1:]}
    tied = minus(each(arms[arm(8, _DEEPEST, TIED)], "loss"), each(arms[arm(8, _DEEPEST)], "loss"))
    disjoint = over_seeds(arms[arm(8, _DEEPEST)], "disjoint")
    loops_pay = all(_counts(difference) for difference in more.values())
    routing_is_why = disjoint[0] >= DISJOINT and _counts(tied)
    balanced = arms[arm(8, _DEEPEST)], arms[arm(8, _DEEPEST, UNBALANCED)]
    entropy = [over_seeds(runs, "entropy")[0] for runs in balanced]
    gain = {experts: mean_std(gain) for experts, gain in gains.items()}
    return Summary(
        verdict(loops_pay and routing_is_why, loops_pay or routing_is_why),
        f"From one loop to {_DEEPEST} the loss falls by {shown(gain[1])} nats per byte without "
        f"experts, by {shown(gain[8])} with 8 and by {shown(gain[16])} with 16. With 8 experts "
        f"{disjoint[0]:.1%} of the tokens meet disjoint sets in consecutive loops, and keeping "
        f"the first loop's experts costs {tied[0]:+.4f} ± {tied[1]:.4f}. Without balancing the "
        f"load's evenness falls from {entropy[0]:.3f} to {entropy[1]:.3f}.",
        f"gain {gain[1][0]:.3f} dense, {gain[8][0]:.3f} of 8, {gain[16][0]:.3f} of 16; "
        f"disjoint {disjoint[0]:.0%}; tied {tied[0]:+.4f}",
        ("arm", "parameters", "active", "loss (nats per byte)", "disjoint sets", "common experts",
         "evenness of load"),
        [_row(name, arms[name]) for name in _ordered(arms)],
        {"loss": {experts: [mean_std(each(arms[arm(experts, loops)], "loss")) for loops in LOOPS]
                  for experts in EXPERTS},
         "tied": mean_std(each(arms[arm(8, _DEEPEST, TIED)], "loss")),
         "disjoint": {name: over_seeds(found, "disjoint")[0]
                      for name, found in arms.items() if "disjoint" in found[0].figures}},
    )  # fmt: skip


def plot(summary: Summary, path: Path) -> None:
    """Loss against loops for every number of experts; how often routing changes."""
    data = summary.data
    with panels(path, 2) as (loss, disjoint):
        for (experts, values), colour in zip(data["loss"].items(), COLOURS, strict=False):
            middles, spreads = zip(*values, strict=True)
            label = f"{experts} expert{'s' if experts > 1 else ''}"
            loss.errorbar(LOOPS, middles, spreads, fmt="o-", capsize=3, color=colour, label=label)
            if experts == 8:
                middle, spread = data["tied"]
                loss.errorbar(_DEEPEST, middle, spread, fmt="x", ms=8, capsize=3, color=colour,
                              label=f"{label}, tied")  # fmt: skip
        loss.set(title="Loss against loops", xlabel="loops", ylabel="nats per byte", xticks=LOOPS)
        loss.legend(fontsize=8)
        names = list(data["disjoint"])
        disjoint.barh(names, [data["disjoint"][name] for name in names], color=COLOURS[0])
        disjoint.axvline(DISJOINT, color=MUTED, ls="--")
        disjoint.set(title="Tokens with disjoint experts from loop to loop", xlim=(0, 1))


def _gains(arms: dict[str, list[Record]], experts: int) -> list[float]:
    """By how much the loss falls from one loop to the most, of every seed."""
    one, most = (each(arms[arm(experts, loops)], "loss") for loops in (LOOPS[0], _DEEPEST))
    return [a - b for a, b in zip(one, most, strict=True)]


def _counts(difference: tuple[float, float]) -> bool:
    return difference[0] > difference[1]


def _ordered(arms: dict[str, list[Record]]) -> list[str]:
    def place(name: str) -> tuple[int, int, str]:
        settings = arms[name][0].settings
        return settings["experts"], settings["loops"], settings["control"]

    return sorted(arms, key=place)


def _row(name: str, found: Sequence[Record]) -> tuple[str, ...]:
    figures = found[0].figures
    routing = [
        f"{over_seeds(found, key)[0]:.3f}" if key in figures else "-"
        for key in ("disjoint", "common", "entropy")
    ]
    return (
        name, f"{figures['parameters']:,}", f"{figures['active_parameters']:,}",
        shown(over_seeds(found, "loss")), *routing,
    )  # fmt: skip
