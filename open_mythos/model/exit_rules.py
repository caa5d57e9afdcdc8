"""Early-exit rules: which positions stop after a loop.

A rule sees the active positions after each loop and selects those that stop. State between loops is
returned as tensors, which the loop keeps aligned with the active positions, so a rule is stateless
and reusable.

    stop_BT, memory = rule(Look(t, h_t, h_t+1, predict), memory)        # memory is None at loop 0

Comparisons with NaN are false: a state that is not finite runs to the requested depth.

For batches whose rows are at different loops, the rules here also return the memory of loop 0
(:class:`BatchedRule`), and their numbers may be tensors (B, 1). A row's verdict is that of the row
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from open_mythos.checks import check_count, check_fields, check_number, checked
from open_mythos.errors import ConfigError
from open_mythos.model.exit_syntax import parse_exit
from open_mythos.model.layers.halting import ACTHalting

Memory = tuple[Tensor, ...]
"""Tensors (B, T, ...) that a rule keeps between loops."""


@dataclass(frozen=True)
class Look:
    """The active positions after a loop."""

    t: int | Tensor
    """0-based index of the loop that has just run; (B, 1) if rows differ."""
    before_BTD: Tensor
    """State h_t before the loop."""
    after_BTD: Tensor
    """State h_{t+1} after the loop."""
    predict: Callable[[], Tensor]
    """Compute the logits (B, T, V) of h_{t+1} through coda and head. Call it after every loop or
    never: the coda attends to earlier positions at the same loop."""


class ExitRule(Protocol):
    """Selects the positions that stop after a loop."""

    def __call__(self, look: Look, memory: Memory | None) -> tuple[Tensor, Memory]:
        """Return (B, T), true where a position stops, and the memory for the next loop."""


class BatchedRule(ExitRule, Protocol):
    """A rule for rows at different loops."""

    def begin(self, shape: Sequence[int], device: torch.device, dim: int) -> Memory:
        """Return the memory for loop 0 of positions ``shape`` (B, T) with states of width ``dim``.

        Its shapes are those of later loops, unless the rule uses predictions.
        """


class Memoryless:
    """A rule that sees each loop by itself."""

    def begin(self, shape: Sequence[int], device: torch.device, dim: int) -> Memory:
        """Return no tensors."""
        return ()


@dataclass(frozen=True)
class FixedDepth(Memoryless):
    """Stops every position after ``loops`` loops, which may be more than the trained depth.

    ``n_loops`` of a call, if given, still is the most.
    """

    loops: int | Tensor

    def __post_init__(self) -> None:
        _check_count("loops", self.loops)

    def __call__(self, look: Look, memory: Memory | None) -> tuple[Tensor, Memory]:
        stop_BT = torch.ones(
            look.after_BTD.shape[:2], dtype=torch.bool, device=look.after_BTD.device
        )
        return stop_BT & (look.t + 1 >= self.loops), ()


@dataclass(frozen=True)
class AtLeast:
    """Another rule, which sees every loop but stops no position before ``loops`` loops."""

    rule: BatchedRule
    loops: int | Tensor

    def __post_init__(self) -> None:
        check_fields("", self)
        _check_count("loops", self.loops)

    def begin(self, shape: Sequence[int], device: torch.device, dim: int) -> Memory:
        """Return the memory of the rule."""
        return self.rule.begin(shape, device, dim)

    def __call__(self, look: Look, memory: Memory | None) -> tuple[Tensor, Memory]:
        stop_BT, memory = self.rule(look, memory)
        return stop_BT & (look.t + 1 >= self.loops), memory


@dataclass(frozen=True)
class GateExit:
    """Stops when the cumulative halting probability of the learned gate reaches ``threshold``.

    Source: Ouro, arXiv 2510.25741, section 3. A higher threshold runs deeper.
    """

    gate: ACTHalting
    threshold: float | Tensor

    def __post_init__(self) -> None:
        check_fields("", self)
        _check_number("threshold", self.threshold, gt=0, le=1)

    def begin(self, shape: Sequence[int], device: torch.device, dim: int) -> Memory:
        """Return probability 1 (B, T) of not having halted."""
        return (torch.ones(*shape, device=device),)

    def __call__(self, look: Look, memory: Memory | None) -> tuple[Tensor, Memory]:
        lambda_BT = self.gate(look.after_BTD)
        (before_BT,) = _begun(self, look, memory)
        running_BT = (1 - lambda_BT) * before_BT
        return 1 - running_BT >= self.threshold, (running_BT,)


@dataclass(frozen=True)
class KLExit:
    """Stops when the prediction has converged and is confident.

    Requires KL(p_t+1 || p_t) < ``kl`` nats, Huginn's criterion (arXiv 2502.05171, section 6), and
    an entropy of p_t+1 below ``entropy`` nats: the divergence alone stops too early where an answer
    takes several loops to appear, since the prediction is a constant guess until then. Smaller
    values run deeper.
    """

    kl: float | Tensor = 0.01
    entropy: float | Tensor = 1.0

    def __post_init__(self) -> None:
        _check_number("kl", self.kl, gt=0)
        _check_number("entropy", self.entropy, gt=0)

    def begin(self, shape: Sequence[int], device: torch.device, dim: int) -> Memory:
        """Return a NaN for all log-probabilities (B, T, 1): there is no earlier prediction."""
        return (torch.full((*shape, 1), torch.nan, device=device),)

    def __call__(self, look: Look, memory: Memory | None) -> tuple[Tensor, Memory]:
        (last_BTV,) = _begun(self, look, memory)
        log_p_BTV = look.predict().float().log_softmax(-1)
        p_BTV = log_p_BTV.exp()
        kl_BT = (p_BTV * (log_p_BTV - last_BTV)).sum(-1)
        entropy_BT = -(p_BTV * log_p_BTV).sum(-1)
        return (kl_BT < self.kl) & (entropy_BT < self.entropy), (log_p_BTV,)


@dataclass(frozen=True)
class StateChange(Memoryless):
    """Stops when the state has converged: ||h_t+1 - h_t|| < ``threshold`` ||h_t+1||.

    A smaller threshold runs deeper.
    """

    threshold: float | Tensor = 0.05

    def __post_init__(self) -> None:
        _check_number("threshold", self.threshold, gt=0)

    def __call__(self, look: Look, memory: Memory | None) -> tuple[Tensor, Memory]:
        change_BT = (look.after_BTD.float() - look.before_BTD.float()).norm(dim=-1)
        return change_BT < self.threshold * look.after_BTD.float().norm(dim=-1), ()


@dataclass(frozen=True)
class Acceleration:
    """Stops when the updates are constant or zero for ``hits`` consecutive loops.

    A hit is ||(h_t+1 - h_t) - (h_t - h_t-1)|| < ``threshold`` ||h_t+1||; requiring two avoids a
    premature exit (arXiv 2509.23314). A smaller threshold or more hits run deeper.
    """

    threshold: float | Tensor = 0.05
    hits: int | Tensor = 2

    def __post_init__(self) -> None:
        _check_number("threshold", self.threshold, gt=0)
        _check_count("hits", self.hits)

    def begin(self, shape: Sequence[int], device: torch.device, dim: int) -> Memory:
        """Return updates (B, T, D) of NaN, to which no update is equal, and hits (B, T)."""
        no_update_BTD = torch.full((*shape, dim), torch.nan, device=device)
        return no_update_BTD, torch.zeros(*shape, device=device)

    def __call__(self, look: Look, memory: Memory | None) -> tuple[Tensor, Memory]:
        after_BTD = look.after_BTD.float()
        delta_BTD = after_BTD - look.before_BTD.float()
        last_BTD, hits_BT = _begun(self, look, memory)
        hit_BT = (delta_BTD - last_BTD).norm(dim=-1) < self.threshold * after_BTD.norm(dim=-1)
        hits_BT = torch.where(hit_BT, hits_BT + 1, 0.0)
        return hits_BT >= self.hits, (delta_BTD, hits_BT)


@dataclass(frozen=True)
class ArgmaxStable:
    """Stops when the most likely token has not changed for ``hits`` loops.

    More hits run deeper. Stops too early where the answer takes longer than that to appear.
    """

    hits: int | Tensor = 2

    def __post_init__(self) -> None:
        _check_count("hits", self.hits)

    def begin(self, shape: Sequence[int], device: torch.device, dim: int) -> Memory:
        """Return tokens (B, T) of -1, which is no token, and hits (B, T)."""
        no_token_BT = torch.full(tuple(shape), -1, device=device)
        return no_token_BT, torch.zeros_like(no_token_BT)

    def __call__(self, look: Look, memory: Memory | None) -> tuple[Tensor, Memory]:
        last_BT, same_BT = _begun(self, look, memory)
        token_BT = look.predict().argmax(-1)
        same_BT = torch.where(token_BT == last_BT, same_BT + 1, 0)
        return same_BT >= self.hits, (token_BT, same_BT)


def _begun(rule: BatchedRule, look: Look, memory: Memory | None) -> Memory:
    if memory is not None:
        return memory
    return rule.begin(look.after_BTD.shape[:2], look.after_BTD.device, look.after_BTD.shape[-1])


def _check_number(where: str, value: float | Tensor, **bounds: float) -> None:
    if not isinstance(value, Tensor):  # to read a tensor could be a host-device sync
        check_number(where, value, **bounds)


def _check_count(where: str, value: int | Tensor) -> None:
    if not isinstance(value, Tensor):
        check_count(where, value)


def _gate(model: nn.Module, threshold: float | None = None) -> GateExit:
    gates = [module for module in model.modules() if isinstance(module, ACTHalting)]
    if len(gates) != 1:
        raise ConfigError(
            "the model has no halting gate", where="exit rule", value=type(model).__name__,
            allowed="a looped model", fix="use a rule without a gate",
        )  # fmt: skip
    return GateExit(gates[0], gates[0].threshold if threshold is None else threshold)


EXIT_RULES: dict[str, Callable[..., BatchedRule]] = {
    "fixed": FixedDepth, "gate": GateExit, "kl": KLExit, "change": StateChange,
    "acceleration": Acceleration, "stable": ArgmaxStable,
}  # fmt: skip
"""Name -> rule; "gate" also takes the gate of the model. How they are written: ``EXIT_SYNTAX``."""


@checked
def exit_rule(text: str, model: nn.Module) -> BatchedRule:
    """Parse a rule such as "gate:0.9", "kl:0.01,1.0" or "fixed:4".

    Raises:
        ConfigError: The name is unknown, or a parameter is invalid.
    """
    name, numbers = parse_exit(text, "exit rule (--exit)")
    return _gate(model, *numbers) if name == "gate" else EXIT_RULES[name](*numbers)
