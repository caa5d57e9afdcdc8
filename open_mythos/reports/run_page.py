"""The page: one HTML file without a script that needs no other file."""

from __future__ import annotations

from html import escape
from pathlib import Path
from string import Template
from typing import Any

from open_mythos.reports import run_loops as loops
from open_mythos.reports.run_charts import Line, Mark, curves, short
from open_mythos.reports.run_record import RunRecord, number
from open_mythos.train.config import RunConfig

_FOLDER = Path(__file__).parent / "templates"
_WORDS = {
    "resumed": "resumed from a checkpoint",
    "skipped": "step skipped",
    "rewound": "went back to an older checkpoint",
    "preempted": "told to stop",
    "stopped": "gave up",
    "alarm": "alarm",
}
_SHOWN_ALARMS = 20


def page(run: RunRecord) -> str:
    """The whole page."""
    status, tone = _status(run)
    return Template(_file(_FOLDER / "run.html")).substitute(
        title=escape(f"{run.folder.resolve().name}: training report"),
        style=_file(_FOLDER / "base.css") + _file(_FOLDER / "run.css"),
        name=escape(run.folder.resolve().name),
        status=escape(status),
        tone=tone,
        lead=escape(_lead(run)),
        summary=escape(summary(run)),
        tiles=_tiles(run),
        alarms=_alarms(run),
        notes=_notes(run),
        learning=_learning(run),
        loops=loops.sections(run),
        settings=_settings(run),
    )


def summary(run: RunRecord) -> str:
    """What became of the run, in words, whatever it was."""
    sentences = []
    losses = run.curve("loss")
    if losses:
        step, loss = losses[-1]
        sentences.append(f"The training loss is {loss:.3f} nats per token at step {step:,}.")
    best = loops.best_row(run)
    if best is not None:
        bits = number(best.get("bits_per_byte"))
        figure = f"{bits:.3f} bits per byte" if bits is not None else f"{best['loss']:.3f} nats"
        depth = best.get("depth")
        at = "" if depth is None else f", best with {loops.counted(depth)}"
        sentences.append(f"The validation loss is {figure}{at}.")
    valid = run.valid_range
    if valid is not None:
        sentences.append(f"It is validated at depths from {valid[0]} to {valid[1]} loops.")
    if not run.alarms:
        sentences.append("No alarm was raised.")
    else:
        names = sorted({str(alarm.get("name")) for alarm in run.alarms})
        sentences.append(f"Alarms: {', '.join(names)}.")
    return " ".join(sentences)


def _status(run: RunRecord) -> tuple[str, str]:
    """How far it came, and the class of its colour."""
    wanted, last = run.wanted_steps, run.last_step
    end = run.events[-1].kind if run.events else ""
    if wanted is not None and last >= wanted:
        return f"finished, {last:,} steps", "good"
    of = f" of {wanted:,}" if wanted is not None else ""
    if end == "preempted":
        return f"told to stop after step {last:,}{of}", "warm"
    if end == "stopped":
        return f"gave up after step {last:,}{of}", "warm"
    return f"at step {last:,}{of}: still running, or killed", ""


def _lead(run: RunRecord) -> str:
    counts = run.counts()
    model = "model"
    if run.config is not None:
        model = "looped model" if run.looped else "dense model"
    if counts is not None:
        model += f" of {counts.parameters:,} parameters"
        if counts.active_parameters != counts.parameters:
            model += f" ({counts.active_parameters:,} active per token)"
    tokens = run.latest("tokens")
    learnt = f", trained on {tokens:,} tokens" if isinstance(tokens, int) else ""
    time = f" in {_time(run.seconds)}" if run.seconds else ""
    data = run.setting("data", "path")
    where = f" from {data}" if data and learnt else ""
    return f"A {model}{learnt}{where}{time}."


def _tiles(run: RunRecord) -> str:
    """The figures that one looks for first."""
    tiles: list[tuple[str, str]] = []
    losses, rates = run.curve("loss"), run.curve("tokens_per_second")
    if losses:
        tail = [loss for _, loss in losses[-5:]]
        what = "training loss" if len(tail) < 5 else "training loss, mean of the last 5 lines"
        tiles.append((f"{sum(tail) / len(tail):.3f}", what))
    row = loops.row_at_mean(run)
    if row is not None:
        bits = number(row.get("bits_per_byte"))
        at = "" if row.get("depth") is None else f" with {loops.counted(row['depth'])}"
        shown = (f"{row['loss']:.3f}", f"validation loss{at}")
        tiles.append(shown if bits is None else (f"{bits:.3f}", f"validation bits per byte{at}"))
    valid = run.valid_range
    if valid is not None:
        tiles.append((f"{valid[0]} – {valid[1]}", "loops, validated range"))  # noqa: RUF001
    tokens = number(run.latest("tokens"))
    if tokens is not None:
        tiles.append((short(tokens), "tokens learnt from"))
    if run.seconds:
        tiles.append((_time(run.seconds), "training time"))
    if rates:
        middle = sorted(rate for _, rate in rates)[len(rates) // 2]
        tiles.append((short(middle), "tokens per second, median"))
    use = run.curve("mfu")
    if use:
        tiles.append((f"{use[-1][1]:.1%}", "of the peak FLOP/s (MFU)"))
    tiles.append((str(len(run.alarms)), "alarm" if len(run.alarms) == 1 else "alarms"))
    return "".join(f"<li><b>{escape(b)}</b><span>{escape(text)}</span></li>" for b, text in tiles)


def _alarms(run: RunRecord) -> str:
    if not run.alarms:
        return ""
    items = ""
    for alarm in run.alarms[:_SHOWN_ALARMS]:
        name, what, fix = (escape(str(alarm.get(key, ""))) for key in ("name", "what", "fix"))
        items += f"<dt>{name}, step {alarm['step']:,}</dt><dd>{what}. To do: {fix}.</dd>"
    more = len(run.alarms) - _SHOWN_ALARMS
    rest = f"<p>and {more} more in metrics.jsonl</p>" if more > 0 else ""
    return f'<section class="alarms"><h2>Alarms</h2><dl>{items}</dl>{rest}</section>'


def _notes(run: RunRecord) -> str:
    """What could not be read, or is not there, said once."""
    notes = []
    if run.config is None:
        notes.append("There is no run.yaml, so the configuration is not known.")
    if run.checkpoint is None:
        notes.append("There is no checkpoint yet.")
    elif run.checkpoint.problem:
        where = run.checkpoint.path.name
        notes.append(f"The newest checkpoint ({where}) is damaged: {run.checkpoint.problem}.")
    if run.broken_lines:
        what = "line is" if run.broken_lines == 1 else "lines are"
        notes.append(
            f"{run.broken_lines} {what} not JSON and left out, as when a run is killed while it "
            "writes."
        )
    if not run.steps:
        notes.append("Nothing has been logged yet: there are no curves.")
    return "".join(_missing(note) for note in notes)


def _missing(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>'


def _learning(run: RunRecord) -> str:
    marks = [
        Mark(event.step, event.kind, f"step {event.step:,}: {_words(event.kind)} {event.text}")
        for event in run.events
    ]
    wanted: dict[str, tuple[str, str, dict[str, Any]]] = {
        "loss": ("Loss", "Training loss, nats per token.", {}),
        "grad_norm": ("Gradient norm", "Before clipping.", {"log": True}),
        "lr": ("Learning rate", "", {"zero": True}),
        "tokens_per_second": ("Tokens per second", "Mean between two lines.", {"zero": True}),
        "mfu": ("Model FLOP utilisation", "Share of the devices' peak.", {"zero": True}),
    }
    end = run.wanted_steps if run.last_step < (run.wanted_steps or 0) else None
    parts = []
    for name, (title, about, options) in wanted.items():
        points = run.curve(name)
        if options.get("log"):
            points = [(step, value) for step, value in points if value > 0]
        if points:
            chart = curves([Line(points)], title, marks=marks, x_end=end, **options)
            parts.append(f"<div><h3>{title}</h3><p>{about}</p>{chart}</div>")
    if not parts:
        return _missing("No step has been logged.")
    return f'{_event_legend(run)}<div class="pair">{"".join(parts)}</div>{_event_table(run)}'


def _event_legend(run: RunRecord) -> str:
    kinds = {event.kind: _words(event.kind) for event in run.events}
    items = "".join(
        f'<li><i class="{escape(kind)}"></i>{escape(text)}</li>' for kind, text in kinds.items()
    )
    return f'<ul class="legend">{items}</ul>' if items else ""


def _event_table(run: RunRecord) -> str:
    if not run.events:
        return ""
    rows = "".join(
        f'<tr><td class="n">{event.step:,}</td><td>{escape(_words(event.kind))}</td>'
        f"<td>{escape(event.text)}</td></tr>"
        for event in run.events
    )
    return (
        f'<details><summary>What happened ({len(run.events)})</summary><div class="scroll"><table>'
        f"<tr><th>step</th><th>event</th><th></th></tr>{rows}</table></div></details>"
    )


def _words(kind: str) -> str:
    return _WORDS.get(kind, kind)


def _settings(run: RunRecord) -> str:
    """Every field, section by section; what differs from the default stands out."""
    if run.config is None:
        return _missing("Unknown: neither run.yaml nor a checkpoint tells it.")
    defaults = RunConfig().to_dict()
    top = {name: value for name, value in run.config.items() if not isinstance(value, dict)}
    sections = {"run": top} | {
        name: value for name, value in run.config.items() if isinstance(value, dict)
    }
    parts = []
    for name, values in sections.items():
        known = defaults if name == "run" else defaults.get(name, {})
        rows = "".join(
            f"<tr><th>{escape(str(key))}</th><td{_set(known, key, value)}>{escape(str(value))}</td>"
            "</tr>"
            for key, value in values.items()
        )
        changed = sum(bool(_set(known, key, value)) for key, value in values.items())
        note = f" ({changed} not the default)" if changed else ""
        parts.append(
            f"<details><summary>{escape(name)}{note}</summary><table>{rows}</table></details>"
        )
    return (
        "<p>Fields that differ from the library's defaults are bold.</p>"
        f'<div class="settings">{"".join(parts)}</div>'
    )


def _set(known: Any, key: str, value: Any) -> str:
    same = isinstance(known, dict) and key in known and known[key] == value
    return "" if same else ' class="set"'


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _file(path: Path) -> str:
    return path.read_text(encoding="utf-8")
