"""The report of a training run: one HTML file without scripts or network access."""

from __future__ import annotations

from typing import Any, NamedTuple

from markupsafe import Markup

from open_mythos.reports import run_loops as loops
from open_mythos.reports.figures import Line, Mark
from open_mythos.reports.html import missing, render, table
from open_mythos.reports.run_record import RunRecord, number
from open_mythos.train.config import RunConfig

_EVENTS = {
    "resumed": "resumed from a checkpoint",
    "skipped": "step skipped",
    "rewound": "rolled back to an earlier checkpoint",
    "preempted": "preempted",
    "stopped": "stopped itself",
    "alarm": "alarm",
}


class Section(NamedTuple):
    """A heading with panels."""

    title: str
    panels: list[loops.Panel]
    events: list[tuple[str, str]] = []  # noqa: RUF012
    """Kind and name of the marked events."""
    details: Markup = Markup()
    """Collapsed content below the panels."""


def page(run: RunRecord) -> str:
    """Return the page as HTML."""
    status, tone = _status(run)
    name = run.folder.resolve().name
    return render(
        "run.html",
        title=f"{name}: training report", name=name, status=status, tone=tone, lead=_lead(run),
        tiles=_tiles(run), alarms=run.alarms, notes=_notes(run),
        sections=[_learning(run), *(Section(*each) for each in loops.sections(run))],
        settings=_settings(run),
    )  # fmt: skip


def _status(run: RunRecord) -> tuple[str, str]:
    """Return the progress of the run and its CSS class."""
    wanted, last = number(run.setting("train", "steps")), run.last_step
    end = run.events[-1].kind if run.events else ""
    if wanted is not None and last >= wanted:
        return f"finished, {last:,} steps", "good"
    of = f" of {wanted:,.0f}" if wanted is not None else ""
    if end in ("preempted", "stopped"):
        return f"{_EVENTS[end]} after step {last:,}{of}", "warm"
    return f"at step {last:,}{of}: still running, or killed", ""


def _lead(run: RunRecord) -> str:
    counts = run.counts()
    model = "model" if run.config is None else f"{'looped' if run.looped else 'dense'} model"
    if counts is not None:
        model += f" of {counts.parameters:,} parameters"
        if counts.active_parameters != counts.parameters:
            model += f" ({counts.active_parameters:,} active per token)"
    tokens, data = number(run.latest("tokens")), run.setting("data", "path")
    trained = "" if tokens is None else f", trained on {tokens:,.0f} tokens"
    where = f" from {data}" if data and trained else ""
    return f"A {model}{trained}{where}{f' in {_time(run.seconds)}' if run.seconds else ''}."


def _tiles(run: RunRecord) -> list[tuple[str, str]]:
    """Return the key numbers with their descriptions."""
    tiles: list[tuple[str, str]] = []
    if losses := [loss for _, loss in run.values("loss")[-5:]]:
        what = "training loss" + (", mean of the last 5 lines" if len(losses) == 5 else "")
        tiles.append((f"{sum(losses) / len(losses):.3f}", what))
    if (row := loops.row_at_mean(run)) is not None:
        bits = number(row.get("bits_per_byte"))
        depth = row.get("depth")
        at = "" if depth is None else f" with {depth:g} loop{'' if depth == 1 else 's'}"
        value, unit = (row["loss"], "loss") if bits is None else (bits, "bits per byte")
        tiles.append((f"{value:.3f}", f"validation {unit}{at}"))
    if run.valid_range is not None:
        tiles.append(("{} – {}".format(*run.valid_range), "loops, validated range"))  # noqa: RUF001
    if (tokens := number(run.latest("tokens"))) is not None:
        tiles.append((_short(tokens), "training tokens"))
    if run.seconds:
        tiles.append((_time(run.seconds), "training time"))
    if rates := sorted(rate for _, rate in run.values("tokens_per_second")):
        tiles.append((_short(rates[len(rates) // 2]), "tokens per second, median"))
    if use := run.values("mfu"):
        tiles.append((f"{use[-1][1]:.1%}", "of the peak FLOP/s (MFU)"))
    return [*tiles, (str(len(run.alarms)), "alarm" if len(run.alarms) == 1 else "alarms")]


def _notes(run: RunRecord) -> list[Markup]:
    """Return notes on missing or unreadable parts."""
    notes = []
    if run.config is None:
        notes.append("There is no run.yaml, so the configuration is unknown.")
    if run.checkpoint is None:
        notes.append("There is no checkpoint yet.")
    elif run.checkpoint.problem:
        name, problem = run.checkpoint.path.name, run.checkpoint.problem
        notes.append(f"The newest checkpoint ({name}) is damaged: {problem}.")
    if run.broken_lines:
        what = "1 line is" if run.broken_lines == 1 else f"{run.broken_lines} lines are"
        notes.append(f"{what} not valid JSON and ignored, as after a kill during a write.")
    if not run.steps:
        notes.append("Nothing has been logged yet: there are no curves.")
    return [missing(note) for note in notes]


def _learning(run: RunRecord) -> Section:
    marks = [
        Mark(event.step, event.kind, f"step {event.step:,}: {_name(event.kind)} {event.text}")
        for event in run.events
    ]
    wanted: dict[str, tuple[str, str, dict[str, Any]]] = {
        "loss": ("Loss", "Training loss, nats per token.", {}),
        "grad_norm": ("Gradient norm", "Before clipping.", {"log": True}),
        "lr": ("Learning rate", "", {"zero": True}),
        "tokens_per_second": ("Throughput", "Tokens per second between log lines.", {"zero": True}),
        "mfu": ("Model FLOPs utilization", "Share of the devices' peak.", {"zero": True}),
    }
    end = number(run.setting("train", "steps"))
    panels: list[loops.Panel] = []
    for name, (title, about, options) in wanted.items():
        line = Line(run.curve(name))
        panels += loops.drawn(title, about, [line], marks=marks, x_end=end, **options)
    if not panels:
        return Section("Learning", [loops.Panel("", "", missing("No step has been logged."))])
    rows = [(event.step, _name(event.kind), event.text) for event in run.events]
    events = [(event.kind, _name(event.kind)) for event in run.events]
    details = table(("step", "event", ""), rows) if rows else Markup()
    return Section("Learning", panels, events, details)


def _name(kind: str) -> str:
    return _EVENTS.get(kind, kind)


def _settings(run: RunRecord) -> dict[str, list[tuple[str, str, bool]]]:
    """Return section -> (field, value, whether it differs from the default)."""
    defaults, found = RunConfig().to_dict(), dict[str, list[tuple[str, str, bool]]]()
    for name, value in (run.config or {}).items():
        known = defaults.get(name)
        if not isinstance(value, dict):
            found.setdefault("run", []).append((name, str(value), known != value))
            continue
        fields = known if isinstance(known, dict) else {}
        found[name] = [
            (str(key), str(each), key not in fields or fields[key] != each)
            for key, each in value.items()
        ]
    return found


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _short(value: float) -> str:
    """Format a number with an SI prefix: 1.2 M, 34 k."""
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"
