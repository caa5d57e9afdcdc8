"""Exit rules of the engine's slots: every row with parameters, loop index and memory of its own."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from open_mythos.errors import ConfigError, InternalError
from open_mythos.inference.request import RULES, Request
from open_mythos.model.exit_rules import (
    Acceleration,
    AtLeast,
    BatchedRule,
    ExitRule,
    FixedDepth,
    GateExit,
    Look,
    StateChange,
)
from open_mythos.model.layers.halting import ACTHalting


class SlotRules:
    """Decides which rows stop after a loop.

    Args:
        model: The model, whose halting gate the rule "gate" uses.
        n_slots: Number of slots, the dummy included.
        dim: Width D of the state.
        device: Of the slots.
    """

    def __init__(self, model: nn.Module, n_slots: int, dim: int, device: torch.device) -> None:
        self._gate = next((m for m in model.modules() if isinstance(m, ACTHalting)), None)
        kinds = RULES[1:] if self._gate is not None else ()
        self._begin = {kind: self._make(kind, 1.0).begin((1, 1), device, dim) for kind in kinds}
        self._memory = {
            kind: tuple(x.expand(n_slots, *x.shape[1:]).clone() for x in memory)
            for kind, memory in self._begin.items()
        }

    def begin(self, slots_R: Tensor, kinds: Collection[str], real_R: Tensor | None) -> None:
        """Reset the memory of the real rows (None: all), whose token is at its first loop."""
        for kind in kinds:
            kept, fresh = self._memory.get(kind, ()), self._begin.get(kind, ())
            for tensor, value in zip(kept, fresh, strict=True):
                if real_R is None:
                    tensor[slots_R] = value
                    continue
                real = real_R.view(-1, *[1] * (tensor.dim() - 1))
                tensor[slots_R] = torch.where(real, value, tensor[slots_R])

    def tensors(self) -> list[Tensor]:
        """Return all tensors with a row per slot."""
        return [tensor for memory in self._memory.values() for tensor in memory]

    def stops(
        self,
        kinds: Collection[str],
        slots_R: Tensor,
        rule_R: Tensor,
        numbers_R2: Tensor,
        look: Look,
    ) -> Tensor:
        """Return (R,) true where the row's own rule stops it.

        Args:
            kinds: Rules of the rows.
            slots_R: Slots of the rows.
            rule_R: Index of each row's rule in RULES.
            numbers_R2: Parameters of each row's rule.
            look: States of all rows; ``look.t`` is (R, 1).
        """
        stop_R = torch.zeros_like(slots_R, dtype=torch.bool)
        for kind in kinds:
            if kind == "none":
                continue
            memory = self._memory[kind]
            rule = self._make(kind, numbers_R2[:, :1], numbers_R2[:, 1:])
            verdict_R1, after = rule(look, tuple(each[slots_R] for each in memory))
            for kept, new in zip(memory, after, strict=True):
                kept[slots_R] = new
            stop_R = stop_R | (verdict_R1[:, 0] & (rule_R == RULES.index(kind)))
        return stop_R

    def of(self, request: Request) -> ExitRule | None:
        """Return a request's rule, for its prompt."""
        if request.rule == "none":
            return None
        rule = self._make(request.rule, request.numbers[0], *map(int, request.numbers[1:]))
        return AtLeast(rule, request.min_loops) if request.min_loops > 1 else rule

    def _make(
        self, kind: str, first: float | Tensor, hits: int | Tensor = 1
    ) -> BatchedRule:  # fmt: skip
        if kind == "gate":
            if self._gate is None:
                raise InternalError(
                    "the model has no halting gate",
                    where="exit rule",
                    value=kind,
                    allowed="a looped model",
                )
            return GateExit(self._gate, first)
        return StateChange(first) if kind == "change" else Acceleration(first, hits)


def describe_rule(rule: ExitRule | None) -> tuple[str, tuple[float, ...], int, int | None]:
    """Return name, parameters, fewest loops, and (of a fixed depth) most loops of a rule.

    Raises:
        ConfigError: The engine cannot run the rule.
    """
    least = 1
    if isinstance(rule, AtLeast):
        least, rule = int(rule.loops), rule.rule
    match rule:
        case None:
            return "none", (), least, None
        case FixedDepth(loops=loops):
            return "none", (), least, max(least, int(loops))
        case GateExit(threshold=threshold):
            return "gate", (float(threshold),), least, None
        case StateChange(threshold=threshold):
            return "change", (float(threshold),), least, None
        case Acceleration(threshold=threshold, hits=hits):
            return "acceleration", (float(threshold), float(hits)), least, None
    raise ConfigError(
        "the engine cannot run this exit rule", where="exit_rule", value=rule,
        allowed="a fixed depth, gate, change or acceleration",
        fix="rules that use predictions run in generate()",
    )  # fmt: skip
