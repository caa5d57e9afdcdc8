"""Depth of a request: how many loops a token may run, and the rule that ends it earlier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from open_mythos.errors import ConfigError
from open_mythos.inference.server.errors import from_mythos, invalid
from open_mythos.inference.server.protocol import Common
from open_mythos.model.exit_syntax import EXIT_SYNTAX, check, complete, parse_exit
from open_mythos.run_folder import usable_depths

_READ_PREDICTIONS = ("kl", "stable")


@dataclass(frozen=True)
class DepthChoice:
    """Loops and exit rule of a request, complete; a model without loops has 0."""

    max_loops: int
    min_loops: int = 1
    rule: str = "none"
    numbers: tuple[float, ...] = ()


@dataclass(frozen=True)
class DepthPolicy:
    """What the server allows, and what it takes where a request says nothing."""

    exit_rule: str = "none"
    allow_unvalidated: bool = False
    most: int = 256

    def resolve(self, body: Common, facts: Mapping[str, Any]) -> DepthChoice:
        """Return the depth that ``body`` asks for.

        Args:
            body: The request.
            facts: Of the model: trained_depth, validated_depth, max_loops, rules, gate_threshold,
                dense.

        Raises:
            ApiError: 400; ``param`` names the field.
        """
        if facts["dense"]:
            return _dense(body)
        if body.n_loops is not None:
            self._check_n_loops_alone(body)
            self._check_range("n_loops", body.n_loops, facts)
            return DepthChoice(body.n_loops, body.n_loops)
        rule, numbers, fixed = self._rule(body, facts)
        most = facts["trained_depth"] if body.max_loops is None else body.max_loops
        param = "max_loops"
        if fixed is not None and (body.max_loops is None or fixed < most):
            param, most = "exit_rule", fixed
        self._check_range(param, most, facts)
        least = 1 if body.min_loops is None else body.min_loops
        if least > most:
            raise invalid("min_loops", f"must not be above the {most} loops of a token")
        return DepthChoice(most, least if rule != "none" else most, rule, numbers)

    def allowed(self, facts: Mapping[str, Any]) -> tuple[int, int]:
        """Return the least and the most loops that a request may name, for a looped model."""
        most = min(self.most, facts["max_loops"])
        if self.allow_unvalidated:
            return 1, most
        low, high = usable_depths(facts.get("validated_depth"), facts["trained_depth"])
        return low, min(high, most)

    def _check_n_loops_alone(self, body: Common) -> None:
        for other in ("max_loops", "min_loops", "exit_rule", "exit_threshold"):
            if getattr(body, other) is not None:
                raise invalid(
                    "n_loops", f"runs every token to one depth and excludes {other}",
                    "use max_loops",
                )  # fmt: skip

    def _check_range(self, param: str, loops: int, facts: Mapping[str, Any]) -> None:
        low, high = usable_depths(facts.get("validated_depth"), facts["trained_depth"])
        most = min(self.most, facts["max_loops"])
        if loops > most:
            raise invalid(param, f"this server runs at most {most} loops")
        if not self.allow_unvalidated and not low <= loops <= high:
            raise invalid(
                param, f"this model is validated at {low} to {high} loops",
                "the server was started without --allow-unvalidated-depth",
            )  # fmt: skip

    def _rule(
        self, body: Common, facts: Mapping[str, Any]
    ) -> tuple[str, tuple[float, ...], int | None]:
        """Return the rule's name, its numbers, and the depth that "fixed" names."""
        text = self.exit_rule if body.exit_rule is None else body.exit_rule
        if text == "none":
            if body.exit_threshold is not None:
                raise invalid("exit_threshold", "needs an exit_rule")
            return "none", (), None
        try:
            name, given = parse_exit(text, "exit_rule")
        except ConfigError as error:
            raise from_mythos(error, "exit_rule") from None
        if body.exit_threshold is not None:
            given = (_threshold(name, body.exit_threshold), *given[1:])
        if name == "fixed":
            return "none", (), int(given[0])
        _check_served(name, facts)
        numbers = complete(name, given, facts.get("gate_threshold"))
        if len(numbers) < len(EXIT_SYNTAX[name][0]):
            raise invalid("exit_rule", "the model's gate has no threshold: write gate:THRESHOLD")
        return name, numbers, None


def check_default(rule: str) -> None:
    """Check the rule of requests that name none.

    Raises:
        ConfigError: It is no rule, or one that is not served.
    """
    name = rule if rule == "none" else parse_exit(rule, "--exit-rule")[0]
    if name in _READ_PREDICTIONS:
        raise ConfigError(
            "the rule reads predictions, which the server computes once per token",
            where="--exit-rule", value=rule,
            allowed="none, gate, change, acceleration, fixed:LOOPS", fix="choose another rule",
        )  # fmt: skip


def _threshold(name: str, value: float) -> float:
    """Return the threshold that was given apart from its rule."""
    if name == "fixed":
        raise invalid("exit_threshold", "fixed has no threshold")
    try:
        check(EXIT_SYNTAX[name][0][0], value, "exit_threshold")
    except ConfigError as error:
        raise from_mythos(error, "exit_threshold") from None
    return value


def _check_served(name: str, facts: Mapping[str, Any]) -> None:
    if name in _READ_PREDICTIONS:
        raise invalid(
            "exit_rule",
            f"{name} reads the predictions of every loop, which the server computes once per token",
            "use gate, change or acceleration",
        )
    if name not in facts["rules"]:
        raise invalid("exit_rule", f"this model has {', '.join(facts['rules'])}")


def _dense(body: Common) -> DepthChoice:
    for name in ("n_loops", "max_loops", "min_loops"):
        if getattr(body, name) not in (None, 1):
            raise invalid(name, "this model has no loops")
    if body.exit_rule not in (None, "none") or body.exit_threshold is not None:
        raise invalid("exit_rule", "this model has no loops")
    return DepthChoice(0, 0)
