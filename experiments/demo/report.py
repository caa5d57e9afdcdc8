"""The demo's report: one HTML file that needs no other."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from string import Template

from experiments.demo.results import Curve, DemoResults

_PAGE = Path(__file__).with_name("report.html")


def write_report(results: DemoResults, picture: Path, path: Path) -> None:
    """Write the page, with the picture inside it."""
    r = results
    overlaps = [row[t + 1] for t, row in enumerate(r.expert_overlap[:-1])]
    page = Template(_PAGE.read_text(encoding="utf-8")).substitute(
        lead=escape(
            "A looped transformer and a dense one with as many parameters: on chains of relations "
            f"and on {r.train_bytes / 1e6:.1f} MB of Python's standard library."
        ),
        summary=escape(text_summary(r)),
        hop_summary=escape(hop_summary(r)),
        hop_table=_hop_table(r),
        entities=r.entities,
        trained_hops=r.trained_hops,
        picture=base64.b64encode(picture.read_bytes()).decode(),
        depth_table=_depth_table(r),
        model_table=_model_table(r),
        expert_table=_expert_table(r),
        even=f"{1 / len(r.expert_load[0]):.1%}",
        overlap=f"{sum(overlaps) / len(overlaps):.0%}",
        samples=_samples(r),
        machine=escape(r.machine),
        versions=escape(r.versions),
        seed=r.seed,
    )
    path.write_text(page, encoding="utf-8")


def hop_summary(r: DemoResults) -> str:
    """What depth did for the chains, in words, whatever it is."""
    i, deepest = r.hops.index(r.asked_hops), r.hop_loops[-1]
    few, many, most = (
        r.hop_accuracy_at(loops)[i] for loops in (r.trained_hops, r.chosen_loops, deepest)
    )
    return (
        f"Chains of {r.asked_hops} relations, trained on {r.trained_hops} at most: the looped "
        f"model answers {few:.0%} with {r.trained_hops} loops, {many:.0%} with {r.chosen_loops} "
        f"and {most:.0%} with {deepest}, from the same weights. Left to stop by itself it answers "
        f"{r.exit_accuracy[i]:.0%} with {r.exit_loops[i]:.1f} loops on average, and runs "
        f"{r.exit_loops[0]:.1f} on chains of {r.hops[0]}. The dense model of as many parameters "
        f"answers {r.hop_dense[i]:.0%}; guessing gives {1 / r.entities:.0%}."
    )


def text_summary(r: DemoResults) -> str:
    """What depth did for the text, in words, whatever it is."""
    at = dict(zip(r.depths, r.looped_bits, strict=True))
    best, deepest = r.best_depth, r.depths[-1]
    gain = (at[1] - at[best]) / at[1]
    drift = at[deepest] - at[best]
    versus = (at[best] - r.dense_bits) / r.dense_bits
    direction = "fewer" if versus < 0 else "more"
    return (
        f"Source text: the looped model needs {at[1]:.3f} bits per byte with one loop and "
        f"{at[best]:.3f} with "
        f"{best}, {gain:.1%} fewer, from the same weights; {abs(versus):.1%} {direction} than "
        f"the dense model's {r.dense_bits:.3f}. At {deepest} loops, {deepest // r.mean_depth} "
        f"times the mean depth of its training, it needs {at[deepest]:.3f} ({drift:+.3f} from its "
        f"best). rho(A) is {r.rho:.3f}."
    )


def _hop_table(r: DemoResults) -> str:
    head = "".join(f"<th>{loops}</th>" for loops in r.hop_loops)
    rows = "".join(
        f"<tr><td>{hops}{' (unseen length)' if hops > r.trained_hops else ''}</td>"
        + "".join(_share_cell(share, 1.0) for share in [*r.hop_accuracy[i], r.exit_accuracy[i]])
        + f"<td>{r.exit_loops[i]:.1f}</td>{_share_cell(r.hop_dense[i], 1.0)}</tr>"
        for i, hops in enumerate(r.hops)
    )
    return (
        f"<table><tr><th>hops \\ loops</th>{head}<th>by itself</th><th>its loops</th>"
        f"<th>dense</th></tr>{rows}</table>"
    )


def _depth_table(r: DemoResults) -> str:
    rows = "".join(
        f'<tr class="{"best" if depth == r.best_depth else ""}"><td>{depth}</td><td>{bits:.4f}</td>'
        f"<td>{bits - r.dense_bits:+.4f}</td><td>{_seen(depth, r)}</td></tr>"
        for depth, bits in zip(r.depths, r.looped_bits, strict=True)
    )
    return (
        "<table><tr><th>loops</th><th>bits per byte</th><th>against dense</th><th></th></tr>"
        f"{rows}<tr><td>dense</td><td>{r.dense_bits:.4f}</td><td></td><td></td></tr></table>"
    )


def _seen(depth: int, r: DemoResults) -> str:
    if depth > r.max_depth:
        return "deeper than ever trained"
    return "mean of training" if depth == r.mean_depth else ""


def _model_table(r: DemoResults) -> str:
    def cells(task: str, c: Curve) -> str:
        return (
            f"<tr><td>{escape(task)}</td><td>{escape(c.label)}</td><td>{c.parameters:,}</td><td>{c.active_parameters:,}</td>"
            f"<td>{c.training_flops / 1e6:.1f}</td><td>{c.seconds:.0f}</td></tr>"
        )

    return (
        "<table><tr><th>task</th><th>model</th><th>parameters</th><th>active per token</th>"
        "<th>training MFLOP per token</th><th>seconds</th></tr>"
        f"{cells('chains', r.hop_looped_run)}{cells('chains', r.hop_dense_run)}"
        f"{cells('text', r.looped)}{cells('text', r.dense)}</table>"
    )


def _expert_table(r: DemoResults) -> str:
    top = max(max(row) for row in r.expert_load)
    head = "".join(f"<th>{i}</th>" for i in range(len(r.expert_load[0])))
    rows = "".join(
        f"<tr><td>{t + 1}</td>" + "".join(_share_cell(share, top) for share in row) + "</tr>"
        for t, row in enumerate(r.expert_load)
    )
    return f"<table><tr><th>loop \\ expert</th>{head}</tr>{rows}</table>"


def _share_cell(share: float, top: float) -> str:
    colour = f"rgba(37, 99, 235, {0.75 * share / top:.2f})"
    return f'<td class="load" style="background:{colour}">{100 * share:.0f}%</td>'


def _samples(r: DemoResults) -> str:
    shown = {f"looped, {depth} loops": text for depth, text in r.samples.items()}
    shown["dense"] = r.dense_sample
    return "".join(
        f"<div><strong>{escape(label)}</strong><pre>{escape(r.prompt + text)}</pre></div>"
        for label, text in shown.items()
    )
