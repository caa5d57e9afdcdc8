"""Stage two: train the halting gate on the frozen model.

The model is trained first, without any gate. The states that it passes through are then a data set:
for every position the state after each loop and the loss of reading it out. From these the gate
learns whether another loop still lowers the loss. Nothing else of the model changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.checks import check_count, pick
from open_mythos.errors import ConfigError, DataError
from open_mythos.evaluation.early_exit import token_scores
from open_mythos.evaluation.frozen import frozen
from open_mythos.model.layers.halting import ACTHalting, exit_loops
from open_mythos.model.mythos import OpenMythos
from open_mythos.seeding import seeded_generator
from open_mythos.train.loss import IGNORE_INDEX
from open_mythos.train.monitoring.alarms import Alarm, halting_alarm
from open_mythos.train.state import TokenBatch

logger = logging.getLogger(__name__)

THRESHOLDS = (0.3, 0.5, 0.7, 0.9, 0.99)
"""Thresholds of the exit rule "gate" at which a report looks."""
_BINS = 10
_HELD_OUT = 0.2


def marginal_gain(loss_LN: Tensor) -> Tensor:
    """(L - 1, N): by how much the next loop alone lowers the loss; 0 where it does not."""
    return (loss_LN[:-1] - loss_LN[1:]).clamp_min(0)


def remaining_gain(loss_LN: Tensor) -> Tensor:
    """(L - 1, N): by how much the best of all later loops lowers the loss; 0 where none does."""
    best_later_LN = loss_LN.flip(0).cummin(0).values.flip(0)[1:]
    return (loss_LN[:-1] - best_later_LN).clamp_min(0)


GATE_TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "remaining": remaining_gain,
    "marginal": marginal_gain,
}
"""Name -> what there is to gain by going on after each loop, from the (L, N) losses.

"marginal" is the greedy signal of Ouro (arXiv 2510.25741, section 3.4): one further loop against
its cost. Where an answer takes several loops to appear at all, the next loop gains nothing until
just before it appears, and such a gate stops at the first loop. "remaining" (ours) looks to the
end.
"""


@dataclass(frozen=True)
class GateConfig:
    """How a gate is trained."""

    n_loops: int = 16
    """Loops L of the trajectory; it should be as deep as the gate will be allowed to go."""
    target: str = "remaining"
    """Name in :data:`GATE_TARGETS`."""
    slope: float = 50.0
    """Target for going on: sigmoid(slope (gain - margin)), gain in nats."""
    margin: float = 0.005
    """Gain in nats at which going on and stopping are equally good."""
    positions: int = 8192
    """Most positions to learn from; they are kept in memory as ``n_loops`` states each."""
    steps: int = 600
    """Optimizer steps."""
    step_positions: int = 512
    """Positions of a step, with all their loops."""
    lr: float = 0.02
    """AdamW's learning rate; it falls linearly to zero."""
    seed: int = 0
    """Of the positions held out and of the order of the others."""

    def validate(self) -> None:
        """Raises ConfigError if a field is out of range."""
        check_count("n_loops", self.n_loops, least=2)
        for name in ("positions", "steps", "step_positions"):
            check_count(name, getattr(self, name))
        check_count("seed", self.seed, least=0)
        for name in ("slope", "lr"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ConfigError("out of range", where=name, value=value, allowed="finite and > 0")
        if not 0 <= self.margin < float("inf"):
            raise ConfigError(
                "out of range", where="margin", value=self.margin, allowed="finite and >= 0"
            )
        pick(GATE_TARGETS, self.target, "target")


@dataclass(frozen=True)
class Trajectory:
    """N positions followed through L loops, with nobody leaving early."""

    states_LND: Tensor
    """The state after each loop, float32."""
    loss_LN: Tensor
    """The loss of reading it out, in nats."""


@dataclass(frozen=True)
class ThresholdRow:
    """What the trained gate does at one threshold, on positions it was not trained on."""

    threshold: float
    """Cumulative halting probability at which a position leaves."""
    mean_loops: float
    """Loops per position."""
    loss: float
    """Nats per token of the states that are left with."""
    finished: float
    """Share of the positions for which no later loop gains more than the margin."""


@dataclass(frozen=True)
class GateReport:
    """How the training went; ``dataclasses.asdict`` makes it JSON."""

    target: str
    """Name of the target."""
    positions: int
    """Positions learnt from; a fifth more was held out for the figures below."""
    curve: list[float]
    """Binary cross-entropy of every step, in nats."""
    loss_by_loop: list[float]
    """(L,) nats per token if every position leaves after that loop."""
    thresholds: list[ThresholdRow]
    """The gate at :data:`THRESHOLDS`."""
    calibration_error: float
    """Mean distance between the probability of going on that the gate gives and its target, over
    ten equal bins of the former."""
    alarms: list[Alarm]
    """"halting_stuck", if the gate always stops at once, or never, at ``act_threshold``."""


def train_gate(
    model: OpenMythos,
    batches: Iterable[TokenBatch],
    config: GateConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> GateReport:
    """Train the halting gate of ``model`` in place; all other weights stay equal bit for bit.

    Positions are followed at full depth, as if nobody left early. The gate's loss is the binary
    cross-entropy between 1 - lambda_t, its probability of going on after loop t, and
    sigmoid(slope (gain_t - margin)). The last loop has no choice and does not count.

    Args:
        model: A trained looped model.
        batches: Read until there are ``config.positions`` targets; representative of what the
            gate will decide on.
        config: Defaults of :class:`GateConfig`.
        dtype: Of the matmuls of the trajectory (autocast).

    Raises:
        ConfigError: The model has no gate, or a field is out of range.
        DataError: The batches hold fewer than two targets, or the trajectory is not finite.
    """
    config = config or GateConfig()
    config.validate()
    path = trajectory(model, batches, config.n_loops, config.positions, dtype=dtype)
    order_N = torch.randperm(
        path.loss_LN.shape[1], generator=seeded_generator(config.seed, "gate/held out")
    ).to(path.loss_LN.device)
    held_out = max(1, int(_HELD_OUT * len(order_N)))
    learn, test = _part(path, order_N[held_out:]), _part(path, order_N[:held_out])
    gate, curve = _fit(learn, config)
    with torch.no_grad():
        trained = model.recurrent.halting.gate
        trained.weight.copy_(gate.gate.weight)
        trained.bias.copy_(gate.gate.bias)
    usual = _at(model.cfg.act_threshold, gate, test, config)
    alarm = halting_alarm(config.steps, usual.mean_loops, config.n_loops)
    if alarm is not None:
        logger.warning("%s", alarm)
    return GateReport(
        target=config.target,
        positions=learn.loss_LN.shape[1],
        curve=curve,
        loss_by_loop=test.loss_LN.mean(1).tolist(),
        thresholds=[_at(threshold, gate, test, config) for threshold in THRESHOLDS],
        calibration_error=calibration_error(gate, test, config),
        alarms=[] if alarm is None else [alarm],
    )


def trajectory(
    model: OpenMythos,
    batches: Iterable[TokenBatch],
    n_loops: int,
    positions: int,
    *,
    dtype: torch.dtype = torch.float32,
) -> Trajectory:
    """Follow the first ``positions`` targets of ``batches`` through ``n_loops`` loops.

    Raises:
        ConfigError: The model has no loops.
        DataError: There are fewer than two targets, or something is not finite.
    """
    if not isinstance(model, OpenMythos):
        raise ConfigError(
            "the model has no halting gate", where="model", value=type(model).__name__,
            allowed="a looped model",
        )  # fmt: skip
    found: list[Trajectory] = []
    with frozen(model, dtype) as device:
        for batch in batches:
            found.append(_follow(model, batch.to(device), n_loops))
            if sum(each.loss_LN.shape[1] for each in found) >= positions:
                break
    states = [each.states_LND for each in found]
    losses = [each.loss_LN for each in found]
    if sum(each.shape[1] for each in losses) < 2:
        raise DataError(
            "too little to train a gate on", where="batches", value="fewer than 2 targets",
            allowed="2 targets at least", fix="check that the batches hold targets",
        )  # fmt: skip
    path = Trajectory(
        torch.cat(states, 1)[:, :positions].float(), torch.cat(losses, 1)[:, :positions]
    )
    if not (path.states_LND.isfinite().all() and path.loss_LN.isfinite().all()):
        raise DataError(
            "states or losses are not finite", where="trajectory", value=f"{n_loops} loops",
            allowed="a model that is stable at this depth", fix="use fewer loops",
        )  # fmt: skip
    return path


def calibration_error(gate: ACTHalting, path: Trajectory, config: GateConfig) -> float:
    """Expected calibration error of 1 - lambda_t against the target, over ten equal bins."""
    with torch.no_grad():
        said = (1 - gate(path.states_LND[:-1])).flatten()
    wanted = _going_on(path.loss_LN, config).flatten()
    at = (said * _BINS).long().clamp_max(_BINS - 1)
    zero = torch.zeros(_BINS, device=said.device)
    return float((zero.index_add(0, at, said - wanted)).abs().sum() / len(said))


def _follow(model: OpenMythos, batch: TokenBatch, n_loops: int) -> Trajectory:
    """The targets of one batch; the logits of one loop and of a chunk of them exist at a time."""
    asked_BT = batch.targets != IGNORE_INDEX
    states, losses = [], []
    ctx = model.context(batch.input_ids, document_ids=batch.document_ids)
    for _, h_BTD in model.unroll(batch.input_ids, n_loops, ctx):
        hidden_BTD = model.final_hidden(h_BTD, ctx)
        states.append(h_BTD[asked_BT])
        losses.append(token_scores(hidden_BTD[asked_BT], model.head, batch.targets[asked_BT])[0])
    return Trajectory(torch.stack(states), torch.stack(losses))


def _going_on(loss_LN: Tensor, config: GateConfig) -> Tensor:
    """(L - 1, N) target of 1 - lambda_t."""
    gain_LN = GATE_TARGETS[config.target](loss_LN)
    return torch.sigmoid(config.slope * (gain_LN - config.margin))


def _fit(path: Trajectory, config: GateConfig) -> tuple[ACTHalting, list[float]]:
    """A gate for the trajectory, and its loss at every step; it begins at zero."""
    dim, device = path.states_LND.shape[-1], path.states_LND.device
    gate = ACTHalting(dim).to(device)
    nn.init.zeros_(gate.gate.weight)
    nn.init.zeros_(gate.gate.bias)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=config.lr, weight_decay=0.0)
    generator = seeded_generator(config.seed, "gate/order")
    states_LND, wanted_LN = path.states_LND[:-1], _going_on(path.loss_LN, config)
    curve = []
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = config.lr * (1 - step / config.steps)
        pick = torch.randint(wanted_LN.shape[1], (config.step_positions,), generator=generator).to(
            device
        )
        # 1 - sigmoid(x) = sigmoid(-x)
        logit_LN = -gate.gate(states_LND[:, pick]).squeeze(-1)
        loss = F.binary_cross_entropy_with_logits(logit_LN, wanted_LN[:, pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return gate, curve


def _part(path: Trajectory, which_N: Tensor) -> Trajectory:
    return Trajectory(path.states_LND[:, which_N], path.loss_LN[:, which_N])


@torch.no_grad()
def _at(threshold: float, gate: ACTHalting, path: Trajectory, config: GateConfig) -> ThresholdRow:
    last_N = exit_loops(gate(path.states_LND), threshold)
    loss_N = path.loss_LN.gather(0, last_N.unsqueeze(0)).squeeze(0)
    left_LN = F.pad(remaining_gain(path.loss_LN), (0, 0, 0, 1))
    left_N = left_LN.gather(0, last_N.unsqueeze(0)).squeeze(0)
    return ThresholdRow(
        threshold, float((last_N + 1).double().mean()), float(loss_N.mean()),
        float((left_N <= config.margin).double().mean()),
    )  # fmt: skip
