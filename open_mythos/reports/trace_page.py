"""The page: one HTML file that needs no other, and nothing of whose content is code."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from open_mythos.reports import trace_charts as charts
from open_mythos.reports.trace_record import PromptTrace, TokenTrace
from open_mythos.reports.words import visible

_FOLDER = Path(__file__).parent / "templates"


def write_page(trace: PromptTrace, path: Path) -> None:
    """Write the page of ``trace`` to ``path``."""
    path.write_text(page(trace), encoding="utf-8")


def page(trace: PromptTrace) -> str:
    """The whole page."""
    return Template(_file("trace.html")).substitute(
        title=escape(f"{_short(trace.prompt)}: {trace.n_loops} loops"),
        style=_file("base.css") + _file("trace.css"),
        script=_file("trace.js"),
        data=_json_in_html(_script_data(trace)),
        prompt=escape(trace.prompt),
        about=escape(f"{trace.checkpoint}: {trace.model}"),
        depth=escape(_depth(trace)),
        summary=escape(summary(trace)),
        legend=_legend(trace),
        table=_table(trace),
        n_loops=trace.n_loops,
        hops=_hops(trace),
        paths=charts.paths(trace),
        changes=charts.changes(trace),
        experts=_experts(trace),
    )


def summary(trace: PromptTrace) -> str:
    """What happened, in words, whatever it was."""
    known = [token for token in trace.tokens if token.right]
    settled = sum(token.settled for token in trace.tokens) / len(trace.tokens)
    sentences = []
    if known:
        after_one, at_end = (sum(token.right[t] for token in known) for t in (0, -1))
        what = "the entity reached" if trace.task == "chains" else "the prompt's own next one"
        sentences.append(
            f"The most likely token is {what} at {after_one} of {len(known)} positions after one "
            f"loop, and at {at_end} after {trace.n_loops}."
        )
    sentences.append(f"Predictions stop changing after loop {settled:.1f} on average.")
    if trace.exit_rule:
        loops = [token.exit or trace.n_loops for token in trace.tokens]
        early = sum(t < trace.n_loops for t in loops)
        sentences.append(
            f"The exit rule {trace.exit_rule} stops {early} of {len(loops)} positions before the "
            f"last loop; they run {sum(loops) / len(loops):.1f} loops on average."
        )
    return " ".join(sentences)


def _depth(trace: PromptTrace) -> str:
    beyond = " (deeper than the default)" if trace.n_loops > trace.trained_loops else ""
    return f"{len(trace.tokens)} tokens, {trace.n_loops} loops{beyond}"


def _legend(trace: PromptTrace) -> str:
    right = "the entity reached" if trace.task == "chains" else "the prompt's own next token"
    items = [
        ('<span class="swatch heat"></span>', "probability"),
        ("<b>bold</b>", "differs from the loop before"),
        ('<span class="swatch hit"></span>', right),
    ]
    if trace.exit_rule:
        items.append(
            ('<span class="swatch stop"></span>', f"where {trace.exit_rule} stops; faded after it")
        )
    return "".join(f"<li>{sign} {escape(text)}</li>" for sign, text in items)


def _table(trace: PromptTrace) -> str:
    """A row for every token, a column for every loop."""
    goal = "leads to" if trace.task == "chains" else "next"
    stops = '<th scope="col">stops</th>' if trace.exit_rule else ""
    loops = "".join(f'<th scope="col" data-t="{t}">{t}</th>' for t in range(1, trace.n_loops + 1))
    rows = "".join(_row(i, token, bool(trace.exit_rule)) for i, token in enumerate(trace.tokens))
    return (
        '<table class="lens"><thead><tr><th scope="col" class="word">token</th>'
        f'<th scope="col">{goal}</th>{stops}{loops}</tr></thead><tbody>{rows}</tbody></table>'
    )


def _row(i: int, token: TokenTrace, stops: bool) -> str:
    goal = "" if token.goal is None else escape(visible(token.goal))
    last = len(token.predictions)
    stop = f'<td class="goal">{"all" if token.exit == last else token.exit}</td>' if stops else ""
    cells = "".join(_cell(i, t, token) for t in range(1, last + 1))
    return (
        f'<tr data-i="{i}"><th scope="row" class="word"><span>{escape(visible(token.text))}</span>'
        f'</th><td class="goal">{goal}</td>{stop}{cells}</tr>'
    )


def _cell(i: int, t: int, token: TokenTrace) -> str:
    """What is predicted after token ``i`` and loop ``t`` (from 1)."""
    best = token.predictions[t - 1][0]
    classes = ["c"]
    if t == 1 or token.predictions[t - 2][0].token != best.token:
        classes.append("new")
    if token.right and token.right[t - 1]:
        classes.append("hit")
    if token.exit is not None and token.exit < len(token.predictions):
        classes += ["stop"] * (t == token.exit) + ["after"] * (t > token.exit)
    layers = token.experts[t - 1] if token.experts else []
    chosen = " / ".join(" ".join(map(str, layer)) for layer in layers)
    experts = f"<small>{chosen}</small>" if chosen else ""
    return (
        f'<td class="{" ".join(classes)}" data-i="{i}" data-t="{t}" '
        f'style="--p:{best.probability:.3f}">'
        f"<span>{escape(visible(best.text))}</span><em>{100 * best.probability:.0f}</em>"
        f"{experts}</td>"
    )


def _hops(trace: PromptTrace) -> str:
    if trace.task != "chains":
        return ""
    return (
        "<section><h2>One hop per loop?</h2><p>Each column is a place in the chain: its token, the "
        "entity that is right there, and the hops to it. Colour is that entity's probability. "
        '<span class="found">Filled</span>: the loop from which on it is the prediction, to the '
        'end. <span class="expected">Ring</span>: where one hop per loop would put it.</p>'
        f'<div class="scroll">{charts.hops(trace)}</div></section>'
    )


def _experts(trace: PromptTrace) -> str:
    if not trace.tokens[0].experts:
        return ""
    layers = range(len(trace.tokens[0].experts[0]))
    pictures = "".join(f'<div class="scroll">{charts.experts(trace, i)}</div>' for i in layers)
    return (
        "<section><h2>Experts</h2><p>Share of the tokens that chose each expert at each loop. "
        f"Outlined: the experts of the chosen token.</p>{pictures}</section>"
    )


def _script_data(trace: PromptTrace) -> dict[str, Any]:
    """What the script needs, with every text made visible."""
    return {
        "loops": trace.n_loops,
        "goal": "entity reached" if trace.task == "chains" else "next in the prompt",
        "tokens": [
            {
                "text": visible(token.text),
                "top": [
                    [[visible(p.text), round(p.probability, 4)] for p in loop]
                    for loop in token.predictions
                ],
                "change": [float(f"{change:.3g}") for change in token.change],
                "experts": token.experts,
                "exit": token.exit,
                "goal": None if token.goal is None else visible(token.goal),
                "p": [round(p, 4) for p in token.goal_probability],
            }
            for token in trace.tokens
        ],
    }


def _json_in_html(value: Any) -> str:
    """JSON that no sequence of characters can end early: < > & only as escapes."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"


def _file(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
