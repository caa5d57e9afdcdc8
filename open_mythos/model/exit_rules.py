"""When a position has thought enough: rules that stop it after a loop.

A rule looks at the positions still running after each loop and says which of them stop. What it
has to remember between loops it hands back as tensors; the loop keeps these aligned with the
positions still running, so a rule holds no state of its own and one rule serves any number of
calls.

    stop_BT, memory = rule(Look(t, h_t, h_t+1, predict), memory)        # memory is None at loop 0

A comparison with a NaN is false: a state that is not finite runs to the depth that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from open_mythos.checks import check_count, check_number
from open_mythos.errors import ConfigError
from open_mythos.model.layers.halting import ACTHalting

Memory = tuple[Tensor, ...]
"""Tensors (B, T, ...) that a rule keeps from one loop to the next."""


@dataclass(frozen=True)
class Look:
    """What a rule sees of the positions still running."""

    t: int
    """The loop that has just run, from 0."""
    before_BTD: Tensor
    """Its state h_t before the loop."""
    after_BTD: Tensor
    """Its state h_{t+1} after the loop."""
    predict: Callable[[], Tensor]
    """Logits (B, T, V) that h_{t+1} stands for. Costs a pass through coda and head when called,
    and has to be called after every loop or never: the coda must remember earlier positions."""


class ExitRule(Protocol):
    """Which positions stop after a loop; see the module's description."""

    def __call__(self, look: Look, memory: Memory | None) -> tuple[Tensor, Memory]:
        """(B, T) boolean, and what to remember."""


@dataclass(frozen=True)
class FixedDepth:
    """Every position stops after ``loops`` loops."""

    loops: int

    def __post_init__(self) -> None:
        check_count("loops", self.loops)

    def __call__(self, look: Look, memory: Memory | None) -> tuple[Tensor, Memory]:
        """As :class:`ExitRule`."""
        shape = look.after_BTD.shape[:2]
        return torch.full(shape, look.t + 1 >= self.loops, device=look.after_BTD.device), ()


@dataclass(frozen=True)
class GateExit:
    """The learned gate: the first loop at which the cumulative halting probability reaches
    ``threshold``. A higher threshold runs deeper. (Ouro, arXiv 2510.25741, section 3)."""

    gate: ACTHalting
    threshold: float

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, gt=0, le=1)

    def __call__(self, look: Look, memory: Memory | None) -> tuple[Tensor, Memory]:
        """As :class:`ExitRule`; remembers the probability of still running."""
        lambda_BT = self.gate(look.after_BTD)
        running_BT = (1 - lambda_BT) * (1.0 if memory is None else memory[0])
        return 1 - running_BT >= self.threshold, (running_BT,)


@dataclass(frozen=True)
class KLExit:
    """The prediction has stopped moving, and is not a shrug.

    Stops where KL(p_t+1 || p_t) < ``kl`` nats and the entropy of p_t+1 is below ``entropy`` nats.
    The divergence between successive predictions is Huginn's criterion (arXiv 2502.05171,
    section 6); alone it stops too early where an answer needs several loops to appear at all,
    because until then the prediction rests at a guess. A smaller ``kl`` or ``entropy`` runs deeper.
    """

    kl: float = 0.01
    entropy: float = 1.0

    def __post_init__(self) -> None:
        check_number("kl", self.kl, gt=0)
        check_number("entropy", self.entropy, gt=0)

    def __call__(self, look: Look, memory: Memory | None) -> tuple[Tensor, Memory]:
        """As :class:`ExitRule`; remembers the last log-probabilities."""
        log_p_BTV = look.predict().float().log_softmax(-1)
        if memory is None:
            return _nowhere(look), (log_p_BTV,)
        p_BTV = log_p_BTV.exp()
        kl_BT = (p_BTV * (log_p_BTV - memory[0])).sum(-1)
        entropy_BT = -(p_BTV * log_p_BTV).sum(-1)
        return (kl_BT < self.kl) & (entropy_BT < self.entropy), (log_p_BTV,)


@dataclass(frozen=True)
class StateChange:
    """The state has stopped moving: ||h_t+1 - h_t|| < ``threshold`` ||h_t+1||.

    A smaller threshold runs deeper.
    """

    threshold: float = 0.05

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, gt=0)

    def __call__(self, look: Look, memory: Memory | None) -> tuple[Tensor, Memory]:
        """As :class:`ExitRule`; remembers nothing."""
        change_BT = (look.after_BTD.float() - look.before_BTD.float()).norm(dim=-1)
        return change_BT < self.threshold * look.after_BTD.float().norm(dim=-1), ()


@dataclass(frozen=True)
class Acceleration:
    """The path has become straight or has ended: the second difference of the state,
    ||(h_t+1 - h_t) - (h_t - h_t-1)||, is below ``threshold`` ||h_t+1|| ``hits`` times in a row.

    Two hits keep a single quiet loop from ending the path (arXiv 2509.23314). A smaller threshold
    or more hits run deeper.
    """

    threshold: float = 0.05
    hits: int = 2

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, gt=0)
        check_count("hits", self.hits)

    def __call__(self, look: Look, memory: Memory | None) -> tuple[Tensor, Memory]:
        """As :class:`ExitRule`; remembers the last difference and the hits so far."""
        after_BTD = look.after_BTD.float()
        delta_BTD = after_BTD - look.before_BTD.float()
        if memory is None:
            return _nowhere(look), (delta_BTD, torch.zeros_like(delta_BTD[..., 0]))
        last_BTD, hits_BT = memory
        hit_BT = (delta_BTD - last_BTD).norm(dim=-1) < self.threshold * after_BTD.norm(dim=-1)
        hits_BT = torch.where(hit_BT, hits_BT + 1, 0.0)
        return hits_BT >= self.hits, (delta_BTD, hits_BT)


@dataclass(frozen=True)
class ArgmaxStable:
    """The most likely token has stayed the same through ``hits`` further loops.

    More hits run deeper. Needs no threshold, and stops too early where the answer takes longer
    than ``hits`` loops to appear.
    """

    hits: int = 2

    def __post_init__(self) -> None:
        check_count("hits", self.hits)

    def __call__(self, look: Look, memory: Memory | None) -> tuple[Tensor, Memory]:
        """As :class:`ExitRule`; remembers the token and how often it has come."""
        token_BT = look.predict().argmax(-1)
        if memory is None:
            return _nowhere(look), (token_BT, torch.zeros_like(token_BT))
        same_BT = torch.where(token_BT == memory[0], memory[1] + 1, 0)
        return same_BT >= self.hits, (token_BT, same_BT)


def _nowhere(look: Look) -> Tensor:
    return torch.zeros(look.after_BTD.shape[:2], dtype=torch.bool, device=look.after_BTD.device)


def _gate(model: nn.Module, threshold: float | None = None) -> GateExit:
    gates = [module for module in model.modules() if isinstance(module, ACTHalting)]
    if len(gates) != 1:
        raise ConfigError(
            "the model has no halting gate", where="exit rule", value=type(model).__name__,
            allowed="a looped model", fix="use a rule without a gate",
        )  # fmt: skip
    return GateExit(gates[0], gates[0].threshold if threshold is None else threshold)


EXIT_RULES: dict[str, tuple[Callable[..., ExitRule], tuple[type, ...], str]] = {
    "fixed": (lambda model, loops: FixedDepth(loops), (int,), "fixed:LOOPS"),
    "gate": (_gate, (float,), "gate or gate:THRESHOLD"),
    "kl": (lambda model, *x: KLExit(*x), (float, float), "kl, kl:KL or kl:KL,ENTROPY"),
    "change": (lambda model, *x: StateChange(*x), (float,), "change or change:THRESHOLD"),
    "acceleration": (
        lambda model, *x: Acceleration(*x),
        (float, int),
        "acceleration, acceleration:THRESHOLD or acceleration:THRESHOLD,HITS",
    ),
    "stable": (lambda model, *x: ArgmaxStable(*x), (int,), "stable or stable:HITS"),
}
"""Name -> how to make the rule of a model, the types of its numbers, how it is written."""


def exit_rule(text: str, model: nn.Module) -> ExitRule:
    """The rule that ``text`` names, such as "gate:0.9", "kl:0.01,1.0" or "fixed:4".

    Raises:
        ConfigError: The name is unknown, or its numbers are not numbers or out of range.
    """
    name, _, numbers = text.partition(":")
    if name in EXIT_RULES:
        make, kinds, _ = EXIT_RULES[name]
        given = numbers.split(",") if numbers else []
        try:
            values = [kind(each) for kind, each in zip(kinds, given, strict=False)]
            if len(given) <= len(kinds) and (values or name != "fixed"):
                return make(model, *values)
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise ConfigError(
                    error.what, where=f"exit rule (--exit) {text!r}", value=error.value,
                    allowed=error.allowed, fix=error.fix.replace("the argument", "in --exit"),
                ) from error  # fmt: skip
    raise ConfigError(
        "not an exit rule", where="exit rule (--exit)", value=text,
        allowed="; ".join(form for _, _, form in EXIT_RULES.values()),
        fix="write the name, a colon, and its numbers separated by commas",
    )  # fmt: skip
