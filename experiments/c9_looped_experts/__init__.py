"""C9: do experts make loops pay, and do tokens use different experts in different loops?"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from torch import Tensor

from experiments.claim import QUICK, Cell, Claim, Place, Record, Summary, sweep, verdict
from experiments.figure import COLOURS, MUTED, panels
from experiments.spread import by_arm, each, mean_std, minus, over_seeds, shown
from experiments.text import Sizes, train
from open_mythos.accounting import account
from open_mythos.config import MythosConfig
from open_mythos.evaluation import expert_routing
from open_mythos.model.context import Context
from open_mythos.model.layers.block import TransformerBlock
from open_mythos.model.layers.experts import Operands
from open_mythos.model.layers.moe import MoEFFN
from open_mythos.model.mythos import OpenMythos
from open_mythos.train.build import Model

LOOPS = (1, 2, 4)
EXPERTS = (1, 8, 16)
TOP_K = 2
TIED, UNBALANCED = "tied", "unbalanced"
"""Controls: the first loop's experts in every loop; no balancing."""
DISJOINT = 0.25

CLAIM = Claim.read(__file__, vars())
_SIZES = Sizes(
    train={"steps": 500, "seq_len": 32, "warmup_steps": 50, "balance_speed": 1e-2},
    widths={"cpu": (32, 4), "gpu": (256, 4), QUICK: (32, 4)},
    val_windows=512, gpu_seq_len=256, quick_steps=3,
)  # fmt: skip


def cells(scale: str) -> list[Cell]:
    """Return three seeds of every number of experts and loops and of the controls."""
    if scale == QUICK:
        return sweep({arm(8, 2, TIED): _settings(8, 2, TIED, scale)}, [0])
    deepest = LOOPS[-1]
    grid = [(experts, loops, "") for loops in reversed(LOOPS) for experts in EXPERTS]
    grid = [(8, deepest, TIED), (8, deepest, UNBALANCED), *grid]
    return sweep({arm(*point): _settings(*point, scale) for point in grid})


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
        lr=2e-3 if scale == "gpu" else 6e-3,
        train={"balance_speed": 0.0} if control == UNBALANCED else {},
    )  # fmt: skip
    return {"experts": experts, "loops": loops, "control": control, **settings}


_ROUTED_BATCHES = 4


class TiedExperts(MoEFFN):
    """Experts chosen in the first loop and kept in later ones; gate weights may change."""

    def __init__(self, cfg: MythosConfig, layer: int = 0) -> None:
        super().__init__(cfg, layer)
        self._call: weakref.ref[Context] | None = None
        self._first_NC: Tensor | None = None

    def operands(self, x_BTD: Tensor, ctx: Context | None) -> Operands:
        """Return the weights; reset the choice when a new forward call starts."""
        assert ctx is not None
        if self._call is None or self._call() is not ctx:
            self._call, self._first_NC = weakref.ref(ctx), None
        return super().operands(x_BTD, ctx)

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route as :meth:`MoEFFN.route`, with the experts of loop 0."""
        scores_NE, experts_NC, weights_NC = super().route(x_ND)
        if self._first_NC is None:
            self._first_NC = experts_NC
            return scores_NE, experts_NC, weights_NC
        weights_NC = scores_NE.gather(-1, self._first_NC)
        return scores_NE, self._first_NC, weights_NC / weights_NC.sum(-1, keepdim=True)


def tie_experts(model: Model) -> None:
    """Replace every MoE layer by a tied one with the same weights."""
    for block in list(model.modules()):
        if isinstance(block, TransformerBlock) and isinstance(block.ffn, MoEFFN):
            tied = TiedExperts(model.cfg, block.layer)
            tied.load_state_dict(block.ffn.state_dict())
            block.ffn = tied


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Train, and measure the loss and the change of routing between loops."""
    s = cell.settings
    trained = train(cell, place, tie_experts if s["control"] == TIED else lambda model: None)
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
    gains = {experts: _gains(arms, experts) for experts in EXPERTS}
    more = {experts: minus(gains[experts], gains[1]) for experts in EXPERTS[1:]}
    tied = minus(each(arms[arm(8, _DEEPEST, TIED)], "loss"), each(arms[arm(8, _DEEPEST)], "loss"))
    disjoint = over_seeds(arms[arm(8, _DEEPEST)], "disjoint")
    loops_pay = all(_counts(difference) for difference in more.values())
    routing_is_why = disjoint[0] >= DISJOINT and _counts(tied)
    balanced = arms[arm(8, _DEEPEST)], arms[arm(8, _DEEPEST, UNBALANCED)]
    entropy = [over_seeds(runs, "entropy")[0] for runs in balanced]
    gain = {experts: mean_std(gain) for experts, gain in gains.items()}
    return Summary(
        verdict(loops_pay and routing_is_why, loops_pay or routing_is_why),
        f"From one loop to {_DEEPEST} the loss falls by {shown(gain[1])} nats per byte without "
        f"experts, by {shown(gain[8])} with 8 and by {shown(gain[16])} with 16. With 8 experts "
        f"{disjoint[0]:.1%} of the tokens meet disjoint sets in consecutive loops, and keeping "
        f"the first loop's experts costs {tied[0]:+.4f} ± {tied[1]:.4f}. Without balancing the "
        f"load's evenness falls from {entropy[0]:.3f} to {entropy[1]:.3f}.",
        f"gain {gain[1][0]:.3f} dense, {gain[8][0]:.3f} of 8, {gain[16][0]:.3f} of 16; "
        f"disjoint {disjoint[0]:.0%}; tied {tied[0]:+.4f}",
        ("arm", "parameters", "active", "loss (nats per byte)", "disjoint sets", "common experts",
         "evenness of load"),
        [_row(name, arms[name]) for name in _ordered(arms)],
        {"loss": {experts: [mean_std(each(arms[arm(experts, loops)], "loss")) for loops in LOOPS]
                  for experts in EXPERTS},
         "tied": mean_std(each(arms[arm(8, _DEEPEST, TIED)], "loss")),
         "disjoint": {name: over_seeds(found, "disjoint")[0]
                      for name, found in arms.items() if "disjoint" in found[0].figures}},
    )  # fmt: skip


def plot(summary: Summary, path: Path) -> None:
    """Plot loss against loops by number of experts, and how often routing changes."""
    data = summary.data
    with panels(path, 2) as (loss, disjoint):
        for (experts, values), colour in zip(data["loss"].items(), COLOURS, strict=False):
            middles, spreads = zip(*values, strict=True)
            label = f"{experts} expert{'s' if experts > 1 else ''}"
            loss.errorbar(LOOPS, middles, spreads, fmt="o-", capsize=3, color=colour, label=label)
            if experts == 8:
                middle, spread = data["tied"]
                loss.errorbar(_DEEPEST, middle, spread, fmt="x", ms=8, capsize=3, color=colour,
                              label=f"{label}, tied")  # fmt: skip
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


def _counts(difference: tuple[float, float]) -> bool:
    return difference[0] > difference[1]


def _ordered(arms: dict[str, list[Record]]) -> list[str]:
    def place(name: str) -> tuple[int, int, str]:
        settings = arms[name][0].settings
        return settings["experts"], settings["loops"], settings["control"]

    return sorted(arms, key=place)


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
