"""C5: how does the loss fall with the number of loops, and where does it saturate?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.c5_saturation.fits import FORMS, Fit, fit
from experiments.claim import QUICK, Cell, Claim, Place, Record, Summary, sweep, verdict
from experiments.figure import COLOURS, MUTED, panels
from experiments.spread import by_arm, mean_std, shown
from experiments.text import Sizes, train

LOOPS = list(range(1, 25))
MEANS = (2, 4, 8)
FITTED = (4, 8)
"""Mean depths with enough points to fit three parameters."""
FLOOR_ERROR = 0.002
FALL = 0.001

CLAIM = Claim.read(__file__, vars())
_SIZES = Sizes(
    train={"steps": 400, "seq_len": 64, "warmup_steps": 40},
    widths={"cpu": (96, 4), "gpu": (512, 8), QUICK: (32, 2)},
    val_windows=256, gpu_seq_len=512, quick_steps=4,
)  # fmt: skip
_SHAPES = {"loop": 0, "prelude-loop-coda": 1}
"""Shape -> blocks before and after the loop."""


def cells(scale: str) -> list[Cell]:
    """Return three seeds of every mean depth and shape, the deepest first."""
    if scale == QUICK:
        return sweep({"loop-mu4": _settings("loop", 4, scale)}, [0])
    shapes = list(_SHAPES) if scale == "cpu" else ["prelude-loop-coda"]
    grid = [(shape, mean) for mean in reversed(MEANS) for shape in shapes]
    return sweep({f"{shape}-mu{mean}": _settings(shape, mean, scale) for shape, mean in grid})


def _settings(shape: str, mean: int, scale: str) -> dict[str, Any]:
    around = _SHAPES[shape]
    settings = _SIZES.settings(
        scale, model={"max_loop_iters": mean, "prelude_layers": around, "coda_layers": around},
        depth={"plan": "poisson", "mean": mean}, lr=1e-3 if scale == "gpu" else 4e-3,
    )  # fmt: skip
    return {"shape": shape, "mu": mean, **settings, "loops": LOOPS}


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Train one model and measure its loss at every depth."""
    trained = train(cell, place)
    return trained.costs() | {"losses": trained.losses(cell.settings["loops"])}


@dataclass(frozen=True)
class Curve:
    """The (seeds, loops) losses of one arm and the fits up to mu."""

    mu: int
    losses: list[list[float]]
    fits: dict[str, list[Fit]]

    @property
    def at_mu(self) -> list[float]:
        """Return L(mu) of every seed."""
        return [losses[self.mu - 1] for losses in self.losses]

    @property
    def falls(self) -> float:
        """Return the mean relative fall of the loss from one loop to mu."""
        return _mean_share([losses[0] for losses in self.losses], self.at_mu)

    @property
    def gain_beyond(self) -> float:
        """Return the mean relative gain of the best depth beyond mu over L(mu)."""
        return _mean_share(self.at_mu, [min(losses[self.mu :]) for losses in self.losses])

    def errors(self, form: str) -> list[float]:
        """Return the mean relative error of the predictions beyond mu for every seed."""
        beyond = range(self.mu + 1, len(self.losses[0]) + 1)
        pairs = zip(self.fits[form], self.losses, strict=True)
        return [
            float(np.mean(np.abs(each.predict(beyond) / np.array(losses[self.mu :]) - 1)))
            for each, losses in pairs
        ]

    @property
    def floor_error(self) -> float:
        """Return the mean relative distance of the exponential's floor from L(mu)."""
        floors = [each.floor for each in self.fits["exponential"]]
        return float(np.mean(np.abs(np.array(floors) / np.array(self.at_mu) - 1)))

    @property
    def saturates(self) -> bool:
        """Return whether the curve meets the pass mark."""
        errors = {form: np.mean(self.errors(form)) for form in FORMS}
        best = min(errors, key=lambda form: errors[form])
        return (
            best == "exponential"
            and self.floor_error <= FLOOR_ERROR
            and self.gain_beyond <= FLOOR_ERROR
        )


def summarise(records: Sequence[Record]) -> Summary:
    """Judge the fits up to mu by their predictions beyond."""
    arms = by_arm(records)
    curves = {arm: _curve(found) for arm, found in arms.items()}
    fitted = {arm: c for arm, c in curves.items() if c.mu in FITTED and c.falls > FALL}
    good = [arm for arm, curve in fitted.items() if curve.saturates]
    worst = max(curves.values(), key=lambda curve: curve.gain_beyond)
    floors = [curve.floor_error for curve in fitted.values()]
    off = f"{min(floors):.2%} to {max(floors):.2%}" if fitted else "-"
    return Summary(
        verdict(
            len(good) == len(fitted), bool(good),
            unclear="" if fitted else "the loss hardly depends on the loops; larger models would "
            "tell",
        ),
        f"{len(good)} of {len(fitted)} curves that fall saturate as claimed "
        f"({', '.join(good) or 'none'}). The exponential's floor is {off} away from L(mu); the "
        f"most that any depth beyond mu gains is {worst.gain_beyond:.2%}.",
        f"{len(good)}/{len(fitted)} curves; floor off by {off}; gain beyond mu <= "
        f"{worst.gain_beyond:.2%}",
        ("model", "parameters", "L(1)", "L(mu)", "L(24)", "gain beyond mu", "floor off L(mu)",
         *(f"error: {form.replace('_', ' ')}" for form in FORMS)),
        [_row(arm, arms[arm], curve) for arm, curve in curves.items()],
        {arm: _drawn(curve) for arm, curve in curves.items()},
    )  # fmt: skip


def plot(summary: Summary, path: Path) -> None:
    """Plot the losses, and their excess over the minimum with the exponential fit."""
    with panels(path, 2) as (curves, logarithmic):
        for (arm, drawn), colour in zip(summary.data.items(), COLOURS, strict=False):
            losses, mu = np.array(drawn["losses"]), drawn["mu"]
            loops = range(1, len(losses) + 1)
            curves.plot(loops, losses, "o-", ms=3, color=colour, label=arm)
            curves.plot(mu, losses[mu - 1], "D", ms=7, color=colour, mfc="white")
            logarithmic.semilogy(
                loops, np.maximum(losses - losses.min(), 1e-5), "o", ms=3, color=colour
            )
            if drawn["fit"]:
                logarithmic.semilogy(loops, np.maximum(np.array(drawn["fit"]) - losses.min(), 1e-5),
                                     "-", lw=1, color=colour)  # fmt: skip
        curves.set(title="Loss against loops (diamond: mean trained depth)", xlabel="loops",
                   ylabel="nats per byte")  # fmt: skip
        curves.legend(fontsize=8)
        logarithmic.axhline(1e-5, color=MUTED, lw=0.8)
        logarithmic.set(title="Above the lowest loss; lines: exponential up to mu", xlabel="loops")


def _curve(found: Sequence[Record]) -> Curve:
    mu = found[0].settings["mu"]
    losses = [record.figures["losses"] for record in found]
    loops = range(1, mu + 1)
    fits = {form: [fit(form, loops, each[:mu]) for each in losses] for form in FORMS}
    return Curve(mu, losses, fits if mu in FITTED else {})


def _row(arm: str, found: Sequence[Record], curve: Curve) -> tuple[str, ...]:
    at = [shown(mean_std([losses[i] for losses in curve.losses])) for i in (0, curve.mu - 1, -1)]
    errors = [f"{np.mean(curve.errors(form)):.3%}" if curve.fits else "-" for form in FORMS]
    return (
        arm, f"{found[0].figures['parameters']:,}", *at, f"{curve.gain_beyond:.3%}",
        f"{curve.floor_error:.3%}" if curve.fits else "-", *errors,
    )  # fmt: skip


def _drawn(curve: Curve) -> dict[str, Any]:
    """Return the means over seeds that the plot shows."""
    loops = range(1, len(curve.losses[0]) + 1)
    fits = curve.fits.get("exponential", [])
    return {
        "mu": curve.mu,
        "losses": np.mean(curve.losses, axis=0).tolist(),
        "fit": np.mean([each.predict(loops) for each in fits], axis=0).tolist() if fits else [],
    }


def _mean_share(before: Sequence[float], after: Sequence[float]) -> float:
    """Return the mean of (before - after) / before."""
    return float(np.mean([(b - a) / b for b, a in zip(before, after, strict=True)]))
