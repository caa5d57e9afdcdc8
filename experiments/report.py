"""Generate ``docs/claims.md`` from the recorded results: ``python -m experiments report``."""

from __future__ import annotations

from pathlib import Path

from experiments.claim import Claim
from experiments.listing import lines, markdown_table, recorded
from experiments.table import CLAIMS, PACKAGE, experiment
from open_mythos.errors import ConfigError

PAGE = "claims.md"
PLOTS = "claims"

_HEAD = """# Published claims, tested

Published claims about looped transformers, tested here; negative results included. This page is
generated from the recorded results of every seed (`python -m experiments report`; a test checks
that it is current). Each pass mark was written before the run and is applied by code. On another
machine the last digits differ, and so may a verdict that is close to its pass mark:
`python -m experiments run CLAIM` reproduces a claim.
"""


def checkout() -> Path:
    """Return the root of the source checkout.

    Raises:
        ConfigError: This package does not run from a source checkout.
    """
    root = PACKAGE.parent
    if not (root / "pyproject.toml").is_file() or not (root / "docs").is_dir():
        raise ConfigError(
            "recording needs a source checkout", where="--record", value=str(root),
            allowed="a folder with pyproject.toml and docs",
            fix="drop --record; results go to runs/experiments or to --out",
        )  # fmt: skip
    return root


def plot_name(claim: str, scale: str) -> str:
    """Return the file name of a claim's plot in ``docs/claims``."""
    return f"{claim}.png" if scale == "cpu" else f"{claim}-{scale}.png"


def update(claim: str = "", scale: str = "cpu") -> None:
    """Write the page, and the plot of ``claim`` if one is given."""
    docs = checkout() / "docs"
    if claim and (known := recorded(claim, scale)):
        (docs / PLOTS).mkdir(exist_ok=True)
        experiment(claim).plot(known[1], docs / PLOTS / plot_name(claim, scale))
    (docs / PAGE).write_text(page(), encoding="utf-8")


def page() -> str:
    """Render the whole page."""
    rows = [
        (
            f"{line.claim} {line.title}", line.source,
            "; ".join([*(f"**{verdict}** ({scale})" for scale, verdict in line.verdicts.items()),
                       *filter(None, [line.missing])]),
            "; ".join(line.keys.values()),
        )
        for line in lines()
    ]  # fmt: skip
    overview = markdown_table(("claim", "source", "verdict", "metrics"), rows)
    return "\n".join([f"{_HEAD}\n{overview.replace('---:', '---')}", *map(_section, CLAIMS)])


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
        f"- **Limits:** {words.limits}\n\n"
        + "\n".join(answers or ["**Not run yet.**\n"])
    )  # fmt: skip


def _answer(words: Claim, scale: str) -> str:
    known = recorded(words.id, scale)
    if known is None:
        return ""
    records, summary = known
    option = "" if scale == "cpu" else f" --scale {scale}"
    minutes = sum(record.seconds for record in records) / 60
    seeds = len({record.seed for record in records})
    machines = "; ".join(sorted({f"{record.machine}; {record.versions}" for record in records}))
    return (
        f"**{summary.verdict[0].upper()}{summary.verdict[1:]}** ({scale}). {summary.sentence}\n\n"
        f"{markdown_table(summary.head, summary.rows)}\n"
        f"![{words.title}]({PLOTS}/{plot_name(words.id, scale)})\n\n"
        f"`python -m experiments run {words.id}{option}`: {len(records)} cells, {seeds} seeds, "
        f"{minutes:.1f} minutes in total; {machines}.\n"
    )
