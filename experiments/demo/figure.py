"""Plot the demo's results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.demo.results import DemoResults
from experiments.figure import log2_ticks, panels

LOOPED, DENSE, MUTED = "#2563eb", "#d97706", "#94a3b8"


def draw(results: DemoResults, path: Path) -> None:
    """Draw the six panels to ``path``; its suffix decides the format."""
    shown = (_chains, _lengths, _depth, _learning, _dynamics, _experts)
    with panels(path, 3, rows=2, size=(5, 4), dpi=130) as axes:
        for panel, ax in zip(shown, axes, strict=True):
            panel(ax, results)


def _chains(ax: Any, r: DemoResults) -> None:
    for hops in (h for h in r.hops if h >= r.trained_hops):
        depth = (hops - r.trained_hops + 2) / (r.hops[-1] - r.trained_hops + 2)
        accuracy = r.hop_accuracy[r.hops.index(hops)]
        ax.plot(r.hop_loops, accuracy, "o-", color=LOOPED, alpha=depth, ms=4, label=f"{hops} hops")
    dense = r.hop_dense[r.hops.index(r.asked_hops)]
    ax.axhline(dense, color=DENSE, ls="--", label=f"dense, {r.asked_hops} hops")
    _loop_axis(ax, r.hop_loops)
    ax.set(
        title=f"Trained on {r.trained_hops} hops, asked for more", ylabel="unseen chains answered",
        ylim=(0, 1.03),
    )  # fmt: skip
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(0, 0.62))


def _lengths(ax: Any, r: DemoResults) -> None:
    few, many = r.hop_accuracy_at(r.trained_hops), r.hop_accuracy_at(r.chosen_loops)
    ax.axvspan(r.hops[0], r.trained_hops, color=LOOPED, alpha=0.07, lw=0)
    ax.plot(r.hops, many, "o-", color=LOOPED, label=f"looped, {r.chosen_loops} loops")
    ax.plot(r.hops, few, "o:", color=LOOPED, label=f"looped, {r.trained_hops} loops")
    ax.plot(r.hops, r.hop_dense, "o--", color=DENSE, label="dense, equal parameters")
    ax.axhline(1 / r.entities, color=MUTED, lw=0.8, ls=":", label="chance")
    ax.set(
        title="Longer chains, same weights", xlabel="hops (shaded: seen in training)",
        ylabel="unseen chains answered", ylim=(0, 1.03),
    )  # fmt: skip
    ax.legend()


def _loop_axis(ax: Any, loops: list[int], note: str = "") -> None:
    log2_ticks(ax, loops)
    ax.minorticks_off()
    ax.set_xlabel(f"loops at inference{note}")


def _depth(ax: Any, r: DemoResults) -> None:
    ax.axvspan(1, r.max_depth, color=LOOPED, alpha=0.07, lw=0)
    looped = f"looped, {_millions(r.looped.parameters)}"
    ax.plot(r.depths, r.looped_bits, "o-", color=LOOPED, label=looped)
    ax.axhline(r.dense_bits, color=DENSE, ls="--", label=f"dense, {_millions(r.dense.parameters)}")
    ax.axvline(r.mean_depth, color=MUTED, lw=0.8, ls=":")
    _loop_axis(ax, r.depths, " (shaded: seen in training)")
    ax.set(title="Text: same weights, more loops", ylabel="bits per byte, unseen files")
    ax.legend()


def _learning(ax: Any, r: DemoResults) -> None:
    for curve, colour in ((r.looped, LOOPED), (r.dense, DENSE)):
        ax.plot(curve.steps, curve.loss, color=colour, label=curve.label)
    ax.set(
        title="Learning text",
        xlabel="optimizer steps (same text, same order)",
        ylabel="training loss, nats per token",
    )
    ax.legend()


def _dynamics(ax: Any, r: DemoResults) -> None:
    loops = range(1, len(r.state_norm) + 1)
    ax.plot(loops, r.state_norm, color=LOOPED, label="norm of the state")
    ax.plot(loops, r.state_change, color=DENSE, label="change made by the loop")
    ax.set_yscale("log")
    ax.set(
        title=f"State over loops, rho(A) = {r.rho:.3f}", xlabel="loop", ylabel="mean norm per token"
    )
    ax.legend()


def _experts(ax: Any, r: DemoResults) -> None:
    image = ax.imshow(r.expert_load, aspect="auto", cmap="Blues", vmin=0)
    loops, experts = len(r.expert_load), len(r.expert_load[0])
    ax.set_xticks(range(experts))
    ax.set_yticks(range(loops), [str(t + 1) for t in range(loops)])
    ax.set(title="Expert load by loop", xlabel="expert", ylabel="loop")
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    ax.figure.colorbar(image, ax=ax, label="share of routed choices", shrink=0.9)


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M parameters"
