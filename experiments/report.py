"""``docs/claims.md``, made from the recorded results and from nothing else.

python -m experiments report
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.claim import Claim, Record, Summary
from experiments.listing import lines, markdown_table, recorded
from experiments.table import CLAIMS, PACKAGE, experiment
from open_mythos.errors import ConfigError

PAGE = "claims.md"
PLOTS = "claims"

_HEAD = """# Claims of the field, answered

What is said about looped transformers, run here, negatives included. This page is made from the
recorded results of every seed (`python -m experiments report`; a test compares). The
pass mark of a claim was written down before the run, and code applies it. Another machine gives
other last digits, and may give another verdict where a result is close:
`python -m experiments run CLAIM` tells.
"""


def checkout() -> Path:
    """The root of the source checkout that this package is run from.

    Raises:
        ConfigError: The package is installed elsewhere.
    """
    root = PACKAGE.parent
    if not (root / "pyproject.toml").is_file() or not (root / "docs").is_dir():
        raise ConfigError(
            "results are recorded in a source checkout only", where="--record", value=str(root),
            allowed="a folder with pyproject.toml and docs",
            fix="leave --record out; results go to runs/experiments or to --out",
        )  # fmt: skip
    return root


def plot_name(claim: str, scale: str) -> str:
    """File of a claim's picture in ``docs/claims``."""
    return f"{claim}.png" if scale == "cpu" else f"{claim}-{scale}.png"


def renew(claim: str = "", scale: str = "cpu") -> None:
    """Write the page, and the picture of ``claim`` if one is named."""
    docs = checkout() / "docs"
    known = recorded(claim, scale) if claim else None
    if known is not None:
        (docs / PLOTS).mkdir(exist_ok=True)
        experiment(claim).plot(known[1], docs / PLOTS / plot_name(claim, scale))
    (docs / PAGE).write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole page."""
    rows = [
        (
            f"{line.claim} {line.title}", line.source,
            "; ".join([*_bold(line.verdicts), *filter(None, [line.missing])]),
            "; ".join(line.keys.values()),
        )
        for line in lines()
    ]  # fmt: skip
    overview = markdown_table(("claim", "source", "verdict", "figures"), rows)
    overview = overview.replace("---:", "---")
    parts = [f"{_HEAD}\n{overview}", *map(_section, CLAIMS)]
    return "\n".join(parts)


def _bold(verdicts: dict[str, str]) -> list[str]:
    return [f"**{verdict}** ({scale})" for scale, verdict in verdicts.items()]


def _section(claim: str) -> str:
    words = experiment(claim).CLAIM
    answers = [answer for scale in words.scales if (answer := _answer(words, scale))]
    return (
        f"## {claim}: {words.title}\n\n"
        f"> {words.statement}\n\n"
        f"- **Source:** {words.source}\n"
        f"- **Literature:** {words.literature}\n"
        f"- **Expected here:** {words.expected}\n"
        f"- **Method:** {words.method}\n"
        f"- **Pass mark:** {words.pass_mark}\n"
        f"- **What this size can show:** {words.limits}\n\n"
        + "\n".join(answers or ["**Not run yet.**\n"])
    )


def _answer(words: Claim, scale: str) -> str:
    known = recorded(words.id, scale)
    if known is None:
        return ""
    records, summary = known
    command = f"python -m experiments run {words.id}" + (
        "" if scale == "cpu" else f" --scale {scale}"
    )
    return (
        f"**{summary.verdict[0].upper()}{summary.verdict[1:]}** ({scale}). {summary.sentence}\n\n"
        f"{markdown_table(summary.head, summary.rows)}\n"
        f"![{words.title}]({PLOTS}/{plot_name(words.id, scale)})\n\n"
        f"`{command}`: {_provenance(records, summary)}\n"
    )


def _provenance(records: Sequence[Record], summary: Summary) -> str:
    """Cells, time, hardware and versions."""
    minutes = sum(record.seconds for record in records) / 60
    seeds = len({record.seed for record in records})
    taken_on = "; ".join(sorted({f"{record.machine}; {record.versions}" for record in records}))
    return f"{len(records)} cells, {seeds} seeds, {minutes:.1f} minutes of cells; {taken_on}."
