"""Train the halting gate of a trained model, whose other weights stay frozen.

The training data are the state of each position after each loop and the loss when that state is
decoded. From these the gate learns whether another loop still lowers the loss.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.checks import check_fields, checked, pick, within
from open_mythos.data.batch import IGNORE_INDEX
from open_mythos.errors import ConfigError, DataError
from open_mythos.evaluation.early_exit import token_scores
from open_mythos.evaluation.frozen import frozen
from open_mythos.model.layers.halting import ACTHalting, exit_loops
from open_mythos.model.mythos import OpenMythos
from open_mythos.seeding import seeded_generator
from open_mythos.train.monitoring.alarms import Alarm, halting_alarm
from open_mythos.train.state import TokenBatch

logger = logging.getLogger(__name__)

THRESHOLDS = (0.3, 0.5, 0.7, 0.9, 0.99)
"""Thresholds of the exit rule "gate" in a report."""
_BINS = 10
_HELD_OUT = 0.2


def marginal_gain(loss_LN: Tensor) -> Tensor:
    """Return (L - 1, N), by how much the next loop alone lowers the loss, at least 0."""
    return (loss_LN[:-1] - loss_LN[1:]).clamp_min(0)


def remaining_gain(loss_LN: Tensor) -> Tensor:
    """Return (L - 1, N), by how much the best of all later loops lowers the loss, at least 0."""
    best_later_LN = loss_LN.flip(0).cummin(0).values.flip(0)[1:]
    return (loss_LN[:-1] - best_later_LN).clamp_min(0)


GATE_TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "remaining": remaining_gain,
    "marginal": marginal_gain,
}
"""Name -> gain from continuing after each loop, a function of the (L, N) losses.

"marginal" is the greedy signal of Ouro (arXiv 2510.25741, section 3.4). If the loss falls only
after several loops, its gate stops at the first one. "remaining" considers all later loops.
"""


@dataclass(frozen=True)
class GateConfig:
    """How a gate is trained."""

    n_loops: int = within(16, ge=2)
    """Loops L of the trajectory; should be the maximum at which the gate will be used."""
    target: str = "remaining"
    """Name in :data:`GATE_TARGETS`."""
    slope: float = within(50.0, gt=0)
    """The target probability of continuing is sigmoid(slope (gain - margin)), gain in nats."""
    margin: float = within(0.005, ge=0)
    """Gain in nats at which continuing and stopping are equally good."""
    positions: int = within(8192, ge=2)
    """Maximum number of positions; ``n_loops`` states of each are kept in memory."""
    steps: int = within(600, ge=1)
    """Optimizer steps."""
    step_positions: int = within(512, ge=1)
    """Positions per step, each with all its loops."""
    lr: float = within(0.02, gt=0)
    """Learning rate of AdamW, which decays linearly to zero."""
    seed: int = within(0, ge=0)
    """Seed of the held-out positions and of the order of the others."""

    def validate(self) -> None:
        """Raise a ConfigError if a field is out of range."""
        check_fields("", self)
        pick(GATE_TARGETS, self.target, "target")


@dataclass(frozen=True)
class Trajectory:
    """States and losses of N positions over L loops, without early exit."""

    states_LND: Tensor
    """State after each loop, float32."""
    loss_LN: Tensor
    """Loss of the state when decoded, in nats."""

    def part(self, which: Tensor | slice) -> Trajectory:
        """Return a subset of the positions."""
        return Trajectory(self.states_LND[:, which], self.loss_LN[:, which])


@dataclass(frozen=True)
class ThresholdRow:
    """The trained gate at one threshold, measured on held-out positions."""

    threshold: float
    """Cumulative halting probability at which a position exits."""
    mean_loops: float
    """Loops per position."""
    loss: float
    """Nats per token of the states at exit."""
    finished: float
    """Fraction of positions for which no later loop gains more than the margin."""


@dataclass(frozen=True)
class GateReport:
    """Result of the training, JSON-ready through ``dataclasses.asdict``."""

    target: str
    """Name of the target."""
    positions: int
    """Positions trained on; a fifth of all positions was held out for the metrics below."""
    curve: list[float]
    """Binary cross-entropy of every step, in nats."""
    loss_by_loop: list[float]
    """(L,) nats per token if every position exits after that loop."""
    thresholds: list[ThresholdRow]
    """The gate at :data:`THRESHOLDS`."""
    calibration_error: float
    """See :func:`calibration_error`."""
    alarms: list[Alarm]
    """"halting_stuck" if the gate always stops at once, or never, at ``act_threshold``."""


@checked
def train_gate(
    model: OpenMythos,
    batches: Iterable[TokenBatch],
    config: GateConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> GateReport:
    """Train the halting gate of ``model`` in place; all other weights stay equal bit for bit.

    The loss is the binary cross-entropy between 1 - lambda_t, the gate's probability of continuing
    after loop t, and sigmoid(slope (gain_t - margin)), for every loop but the last.

    Args:
        model: A trained looped model.
        batches: Read until there are ``config.positions`` targets; should be representative of the
            text that the gate will be used on.
        config: Settings of the training.
        dtype: Autocast dtype of the trajectory's matmuls.

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
    learn, test = path.part(order_N[held_out:]), path.part(order_N[:held_out])
    gate, curve = _fit(learn, config)
    with torch.no_grad():
        trained = model.recurrent.halting.gate
        trained.weight.copy_(gate.gate.weight)
        trained.bias.copy_(gate.gate.bias)
    mean_loops = _at(model.cfg.act_threshold, gate, test, config).mean_loops
    alarm = halting_alarm(config.steps, mean_loops, config.n_loops)
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
    """Run the first ``positions`` targets of ``batches`` through ``n_loops`` loops.

    Raises:
        ConfigError: The model has no loops.
        DataError: There are fewer than two targets, or something is not finite.
    """
    if not isinstance(model, OpenMythos):
        raise ConfigError(
            "the model has no halting gate", where="model", value=type(model).__name__,
            allowed="a looped model",
        )  # fmt: skip
    states, losses, found = [], [], 0
    with frozen(model, dtype) as device:
        for batch in batches:
            part = _run(model, batch.to(device), n_loops)
            states.append(part.states_LND)
            losses.append(part.loss_LN)
            found += part.loss_LN.shape[1]
            if found >= positions:
                break
    if found < 2:
        raise DataError(
            "too little to train a gate on", where="batches", value="fewer than 2 targets",
            allowed="2 targets at least", fix="check that the batches hold targets",
        )  # fmt: skip
    path = Trajectory(torch.cat(states, 1).float(), torch.cat(losses, 1)).part(slice(positions))
    if not (path.states_LND.isfinite().all() and path.loss_LN.isfinite().all()):
        raise DataError(
            "states or losses are not finite", where="trajectory", value=f"{n_loops} loops",
            allowed="a model that is stable at this depth", fix="use fewer loops",
        )  # fmt: skip
    return path


def calibration_error(gate: ACTHalting, path: Trajectory, config: GateConfig) -> float:
    """Return the expected calibration error of 1 - lambda_t against its target, in ten bins."""
    with torch.no_grad():
        predicted = (1 - gate(path.states_LND[:-1])).flatten()
    error = predicted - _continue_target(path.loss_LN, config).flatten()
    bins = (predicted * _BINS).long().clamp_max(_BINS - 1)
    sums = torch.zeros(_BINS, device=error.device).index_add(0, bins, error)
    return float(sums.abs().sum() / len(error))


def _run(model: OpenMythos, batch: TokenBatch, n_loops: int) -> Trajectory:
    """Return the trajectory of one batch; logits exist for one loop and one chunk at a time."""
    asked_BT = batch.targets != IGNORE_INDEX
    states, losses = [], []
    ctx = model.context(batch.input_ids, document_ids=batch.document_ids)
    for _, h_BTD in model.unroll(batch.input_ids, n_loops, ctx):
        hidden_BTD = model.final_hidden(h_BTD, ctx)
        states.append(h_BTD[asked_BT])
        losses.append(token_scores(hidden_BTD[asked_BT], model.head, batch.targets[asked_BT])[0])
    return Trajectory(torch.stack(states), torch.stack(losses))


def _continue_target(loss_LN: Tensor, config: GateConfig) -> Tensor:
    """Return the (L - 1, N) target of 1 - lambda_t."""
    gain_LN = GATE_TARGETS[config.target](loss_LN)
    return torch.sigmoid(config.slope * (gain_LN - config.margin))


def _fit(path: Trajectory, config: GateConfig) -> tuple[ACTHalting, list[float]]:
    """Train a new gate, initialized to zero; return it and its loss at every step."""
    dim, device = path.states_LND.shape[-1], path.states_LND.device
    gate = ACTHalting(dim).to(device)
    nn.init.zeros_(gate.gate.weight)
    nn.init.zeros_(gate.gate.bias)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=config.lr, weight_decay=0.0)
    generator = seeded_generator(config.seed, "gate/order")
    states_LND, wanted_LN = path.states_LND[:-1], _continue_target(path.loss_LN, config)
    curve = []
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = config.lr * (1 - step / config.steps)
        chosen = torch.randint(wanted_LN.shape[1], (config.step_positions,), generator=generator)
        chosen = chosen.to(device)
        # 1 - sigmoid(x) = sigmoid(-x)
        logit_LN = -gate.gate(states_LND[:, chosen]).squeeze(-1)
        loss = F.binary_cross_entropy_with_logits(logit_LN, wanted_LN[:, chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return gate, curve


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
