"""C9: do experts make loops pay, and do tokens use different experts in different loops?"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from experiments.claim import (
    QUICK,
    Cell,
    Claim,
    Place,
    Record,
    Summary,
    arms_by_seed,
    sweep,
    verdict,
)
from experiments.figure import COLOURS, MUTED, panels
from experiments.spread import by_arm, each, mean_std, minus, over_seeds, shown
from experiments.text import Sizes, train
from open_mythos.accounting import account
from open_mythos.config import MythosConfig
from open_mythos.evaluation import expert_routing
from open_mythos.model.context import Context
from open_mythos.model.layers.block import TransformerBlock
from open_mythos.model.layers.experts import Operands
from open_mythos.model.layers.float32 import in_float32
from open_mythos.model.layers.moe import MoEFFN
from open_mythos.model.mythos import OpenMythos
from open_mythos.train.build import Model

LOOPS = (1, 4)
EXPERTS = 16
TOP_K = 2
DENSE, SPARSE = 1, EXPERTS
TIED, PER_LOOP = "tied", "loop-bias"
"""Controls: the first loop's experts in every loop; a learned bias of the router for every loop."""
DISJOINT = 0.25
SEEDS = 2
STEPS = 1000

CLAIM = Claim.read(__file__, vars())
_SIZES = Sizes(
    train={"steps": STEPS, "seq_len": 128, "warmup_steps": STEPS // 10, "global_batch": 16,
           "balance_speed": 1e-2, "dtype": "bfloat16"},
    widths={"cpu": (256, 4), "gpu": (512, 8), QUICK: (32, 4)},
    val_windows=512, gpu_seq_len=512, quick_steps=3,
)  # fmt: skip


def cells(scale: str) -> list[Cell]:
    """Return dense and sparse models at every number of loops and the controls, seed by seed."""
    if scale == QUICK:
        points = [(SPARSE, 2, control) for control in (TIED, PER_LOOP)]
        return sweep({arm(*point): _settings(*point, scale) for point in points}, [0])
    points = [(experts, loops, "") for loops in LOOPS for experts in (DENSE, SPARSE)]
    points += [(SPARSE, LOOPS[-1], control) for control in (TIED, PER_LOOP)]
    arms = {
        arm(*point): dict(zip(("experts", "loops", "control"), point, strict=True))
        | {"seeds": 1 if point[-1] == PER_LOOP else SEEDS}
        for point in points
    }
    return arms_by_seed(arms, partial(_settings, scale=scale))


def arm(experts: int, loops: int, control: str = "") -> str:
    """Return the name of an arm."""
    return f"experts{experts}-loops{loops}" + (f"-{control}" if control else "")


def _settings(experts: int, loops: int, control: str, scale: str) -> dict[str, Any]:
    model = {
        "max_loop_iters": loops, "prelude_layers": 0, "recurrent_layers": 2, "coda_layers": 0,
        "n_experts": experts if experts > 1 else 0, "n_experts_per_tok": TOP_K,
        "n_shared_experts": 0, "expert_dim": _SIZES.widths[scale][0],
    }  # fmt: skip
    settings = _SIZES.settings(
        scale, model=model, depth={"plan": "fixed", "mean": loops},
        lr=1e-2,
    )  # fmt: skip
    settings["run"]["optim"]["name"] = "muon"
    return {"experts": experts, "loops": loops, "control": control, **settings}


_ROUTED_BATCHES = 4


class _CountingExperts(MoEFFN):
    """Experts that know the loop: the calls within a forward call are counted."""

    def __init__(self, cfg: MythosConfig, layer: int = 0) -> None:
        super().__init__(cfg, layer)
        self.loop = 0
        self._call: weakref.ref[Context] | None = None

    def operands(self, x_BTD: Tensor, ctx: Context | None) -> Operands:
        """Return the weights; start again at loop 0 in a new forward call."""
        assert ctx is not None
        new = self._call is None or self._call() is not ctx
        self.loop, self._call = 0 if new else self.loop + 1, weakref.ref(ctx)
        return super().operands(x_BTD, ctx)


class TiedExperts(_CountingExperts):
    """Experts chosen in the first loop and kept in later ones; gate weights may change."""

    def __init__(self, cfg: MythosConfig, layer: int = 0) -> None:
        super().__init__(cfg, layer)
        self._first_NC: Tensor | None = None

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route as :meth:`MoEFFN.route`, with the experts of loop 0."""
        scores_NE, experts_NC, weights_NC = super().route(x_ND)
        if self.loop == 0:
            self._first_NC = experts_NC
            return scores_NE, experts_NC, weights_NC
        assert self._first_NC is not None
        weights_NC = scores_NE.gather(-1, self._first_NC)
        return scores_NE, self._first_NC, weights_NC / weights_NC.sum(-1, keepdim=True)


class BiasedByLoop(_CountingExperts):
    """Experts whose router adds a learned bias of the loop to its logits, zero at the start."""

    def __init__(self, cfg: MythosConfig, layer: int = 0) -> None:
        super().__init__(cfg, layer)
        # flat: Muon takes matrices
        self.loop_bias = nn.Parameter(torch.zeros(cfg.max_loop_iters * cfg.n_experts))

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route as :meth:`MoEFFN.route` with the bias of the loop."""
        bias_LE = self.loop_bias.view(-1, len(self.router_bias))
        bias_E = bias_LE[min(self.loop, len(bias_LE) - 1)]
        return self.chosen((in_float32(self.router, x_ND) + bias_E).sigmoid())


_CONTROLS: dict[str, type[_CountingExperts]] = {TIED: TiedExperts, PER_LOOP: BiasedByLoop}


def control_experts(model: Model, control: str) -> None:
    """Replace every MoE layer by that of a control, with the same weights; "" is no control."""
    if not control:
        return
    for block in list(model.modules()):
        if isinstance(block, TransformerBlock) and isinstance(block.ffn, MoEFFN):
            changed = _CONTROLS[control](model.cfg, block.layer)
            changed.load_state_dict(block.ffn.state_dict(), strict=False)
            block.ffn = changed


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Train, and measure the loss and the change of routing between loops."""
    s = cell.settings
    trained = train(cell, place, lambda model: control_experts(model, s["control"]))
    counts = account(trained.model)
    figures = trained.costs() | {
        "loss": trained.losses([s["loops"]])[0],
        "active_parameters": counts.active_parameters - counts.active["embedding"]
        - counts.active["head"],
    }  # fmt: skip
    if s["experts"] > 1:
        assert isinstance(trained.model, OpenMythos)
        layers = expert_routing(trained.model, trained.batches[:_ROUTED_BATCHES], s["loops"])
        figures["entropy"] = mean(each for layer in layers for each in layer.entropy)
        if s["loops"] > 1:
            consecutive = [(layer, t) for layer in layers for t in range(s["loops"] - 1)]
            figures["disjoint"] = mean(layer.disjoint[t][t + 1] for layer, t in consecutive)
            figures["common"] = mean(layer.overlap[t][t + 1] for layer, t in consecutive)
    return figures


_DEEPEST = LOOPS[-1]


def summarise(records: Sequence[Record]) -> Summary:
    """Judge the gain from loops with and without experts, and the role of routing."""
    arms = by_arm(records)
    free = arms[arm(SPARSE, _DEEPEST)]
    gains = {experts: _gains(arms, experts) for experts in (DENSE, SPARSE)}
    more = minus(gains[SPARSE], gains[DENSE])
    against = {c: _from(arms[arm(SPARSE, _DEEPEST, c)], free)
               for c in (TIED, PER_LOOP)}  # fmt: skip
    disjoint, by_bias = (
        over_seeds(arms[arm(SPARSE, _DEEPEST, control)], "disjoint") for control in ("", PER_LOOP)
    )
    loops_pay = _counts(more)
    routing_is_why = max(disjoint[0], by_bias[0]) >= DISJOINT and _counts(against[TIED])
    gain = {experts: mean_std(gain) for experts, gain in gains.items()}
    return Summary(
        verdict(loops_pay and routing_is_why, loops_pay or routing_is_why),
        f"From one loop to {_DEEPEST} the loss falls by {shown(gain[DENSE])} nats per byte without "
        f"experts and by {shown(gain[SPARSE])} with {SPARSE}. {disjoint[0]:.1%} of the tokens meet "
        f"disjoint sets in consecutive loops, {by_bias[0]:.1%} with a bias for every loop, which "
        f"changes the loss by {_signed(against[PER_LOOP])}; keeping the first loop's experts "
        f"changes it by {_signed(against[TIED])}. The evenness of the load is "
        f"{over_seeds(free, 'entropy')[0]:.3f}.",
        f"gain {gain[DENSE][0]:.3f} dense, {gain[SPARSE][0]:.3f} of {SPARSE}; disjoint "
        f"{disjoint[0]:.0%}; tied {against[TIED][0]:+.4f}",
        ("arm", "parameters", "active", "loss (nats per byte)", "disjoint sets", "common experts",
         "evenness of load"),
        [_row(name, found) for name, found in arms.items()],
        {"loss": {experts: [mean_std(each(arms[arm(experts, loops)], "loss")) for loops in LOOPS]
                  for experts in (DENSE, SPARSE)},
         "controls": {c: mean_std(each(arms[arm(SPARSE, _DEEPEST, c)], "loss")) for c in against},
         "disjoint": {name: over_seeds(found, "disjoint")[0]
                      for name, found in arms.items() if "disjoint" in found[0].figures}},
    )  # fmt: skip


def plot(summary: Summary, path: Path) -> None:
    """Plot loss against loops by number of experts, and how often routing changes."""
    data = summary.data
    with panels(path, 2) as (loss, disjoint):
        for (experts, values), colour in zip(data["loss"].items(), COLOURS, strict=False):
            middles, spreads = zip(*values, strict=True)
            label = f"{experts} experts" if experts > 1 else "no experts"
            loss.errorbar(LOOPS, middles, spreads, fmt="o-", capsize=3, color=colour, label=label)
        for (control, (middle, spread)), colour in zip(
            data["controls"].items(), COLOURS[2:], strict=False
        ):
            loss.errorbar(_DEEPEST, middle, spread, fmt="x", ms=8, capsize=3, color=colour,
                          label=f"{SPARSE} experts, {control}")  # fmt: skip
        loss.set(title="Loss against loops", xlabel="loops", ylabel="nats per byte", xticks=LOOPS)
        loss.legend(fontsize=8)
        names = list(data["disjoint"])
        disjoint.barh(names, [data["disjoint"][name] for name in names], color=COLOURS[0])
        disjoint.axvline(DISJOINT, color=MUTED, ls="--")
        disjoint.set(title="Tokens with disjoint experts from loop to loop", xlim=(0, 1))


def _gains(arms: dict[str, list[Record]], experts: int) -> list[float]:
    """Return the fall of the loss from one loop to the most for every seed."""
    one, most = (each(arms[arm(experts, loops)], "loss") for loops in (LOOPS[0], _DEEPEST))
    return [a - b for a, b in zip(one, most, strict=True)]


def _from(ours: Sequence[Record], theirs: Sequence[Record]) -> tuple[float, float]:
    """Return mean and deviation of the differences of loss, over the seeds that ``ours`` has."""
    return minus(each(ours, "loss"), each(theirs[: len(ours)], "loss"))


def _counts(difference: tuple[float, float]) -> bool:
    return difference[0] > difference[1]


def _signed(difference: tuple[float, float]) -> str:
    middle, spread = difference
    return f"{middle:+.4f}" + (f" ± {spread:.4f}" if spread else " (one seed)")


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
