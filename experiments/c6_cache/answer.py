"""From counts and measurements to the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.c6_cache.cache_rows import CacheRow
from experiments.c6_cache.cells import ATTENTIONS, COUNTED, EXACT, PRODUCTION, SMALLER
from experiments.claim import Record, Summary, verdict
from experiments.figure import COLOURS, MUTED, panels
from experiments.spread import by_arm


def summarise(records: Sequence[Record]) -> Summary:
    """Ratios per variant, and whether the measured caches are exact and as large as counted."""
    arms = by_arm(records)
    counted = [CacheRow(**row) for row in arms.pop(COUNTED)[0].figures["rows"]]
    large = [row for row in counted if row.variant in PRODUCTION]
    over_mha = [row.over_mha for row in large]
    over_gqa = [ratio for row in large for ratio in (row.over_gqa8, row.over_gqa4) if ratio]
    exact = [r.figures["difference"] for arm in ATTENTIONS for r in arms[arm]]
    as_counted = all(
        r.figures["bytes"] == r.figures["formula"] for r in records if r.arm != COUNTED
    )
    sound = as_counted and max(exact) < EXACT
    in_part = sound and min(over_mha) >= SMALLER
    shared = max(r.figures["other_choices"] for arm in ATTENTIONS for r in arms[f"{arm}-shared"])
    return Summary(
        verdict(in_part and min(over_gqa) >= SMALLER, in_part),
        f"From 1b on the MLA cache is {_range(over_mha)} smaller than that of multi-head "
        f"attention, and {_range(over_gqa)} against 8 or 4 key/value heads. On small models the "
        f"bytes held {'equal' if as_counted else 'differ from'} the formula and cached logits "
        f"differ from uncached ones by at most {max(exact):.1e}; one slot for all loops, on "
        f"weights not trained for it, changes the most likely token at up to {shared:.0%} of the "
        "positions.",
        f"{_range(over_mha)} vs MHA, {_range(over_gqa)} vs GQA",
        ("variant", "MLA", "MHA", "GQA-8", "GQA-4", "vs MHA", "vs GQA-8", "vs GQA-4", "slots",
         "KiB per token", "one slot for all loops"),
        [_row(row) for row in counted],
        {"variants": [row.variant for row in counted],
         "MHA": [row.over_mha for row in counted],
         "GQA-8": [row.over_gqa8 for row in counted],
         "GQA-4": [row.over_gqa4 for row in counted],
         "measured": {arm: found[0].figures["bytes"] for arm, found in arms.items()}},
    )  # fmt: skip


def plot(summary: Summary, path: Path) -> None:
    """Ratios of every variant; bytes of the measured models."""
    data = summary.data
    with panels(path, 2) as (ratios, held):
        for rival, colour in zip(("MHA", "GQA-8", "GQA-4"), COLOURS, strict=False):
            found = [(v, r) for v, r in zip(data["variants"], data[rival], strict=True) if r]
            ratios.plot(*zip(*found, strict=True), "o-", color=colour, label=f"against {rival}")
        ratios.axhspan(SMALLER, 2 * SMALLER, color=MUTED, alpha=0.2, lw=0, label="claimed")
        ratios.set_yscale("log")
        ratios.set_yticks((1, 2, 5, 10, 20), ("1", "2", "5", "10", "20"))
        ratios.set(title="MLA cache: how many times smaller", xlabel="variant")
        ratios.legend()
        arms = data["measured"]
        held.barh(list(arms), [size / 1024 for size in arms.values()], color=COLOURS[0])
        held.set(title="Cache of the measured model", xlabel="KiB held")


def _range(ratios: Sequence[float]) -> str:
    return f"{min(ratios):.1f}-{max(ratios):.1f}x"


def _row(row: CacheRow) -> tuple[str, ...]:
    ratios = (row.over_mha, row.over_gqa8, row.over_gqa4)
    return (
        row.variant, str(row.mla), str(row.mha), str(row.gqa8 or "-"), str(row.gqa4 or "-"),
        *("-" if ratio is None else f"{ratio:.1f}" for ratio in ratios), str(row.slots),
        f"{row.bytes_per_token / 1024:.1f}", f"{row.bytes_per_token_shared / 1024:.1f}",
    )  # fmt: skip
