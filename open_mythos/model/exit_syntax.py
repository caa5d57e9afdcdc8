"""How exit rules are written: names, numbers and their bounds (this module loads no torch)."""

from __future__ import annotations

from dataclasses import dataclass, field

from open_mythos.checks import check_count, check_number
from open_mythos.errors import ConfigError


@dataclass(frozen=True)
class Number:
    """A parameter of a rule."""

    name: str
    kind: type
    default: float | None = None
    """None: it must be given, or the model holds it."""
    bounds: dict[str, float] = field(default_factory=lambda: {"gt": 0})


_THRESHOLD, _HITS = Number("threshold", float, 0.05), Number("hits", int, 2)

EXIT_SYNTAX: dict[str, tuple[tuple[Number, ...], str]] = {
    "fixed": ((Number("loops", int),), "fixed:LOOPS"),
    "gate": (
        (Number("threshold", float, None, {"gt": 0, "le": 1}),),
        "gate or gate:THRESHOLD",
    ),
    "kl": (
        (Number("kl", float, 0.01), Number("entropy", float, 1.0)),
        "kl, kl:KL or kl:KL,ENTROPY",
    ),
    "change": ((_THRESHOLD,), "change or change:THRESHOLD"),
    "acceleration": (
        (_THRESHOLD, _HITS),
        "acceleration, acceleration:THRESHOLD or acceleration:THRESHOLD,HITS",
    ),
    "stable": ((_HITS,), "stable or stable:HITS"),
}
"""Name -> its parameters, and how it is written."""


def parse_exit(text: str, where: str) -> tuple[str, tuple[float, ...]]:
    """Parse a rule such as "gate:0.9" or "acceleration:0.05,2" into its name and given numbers.

    Args:
        text: The rule.
        where: The option or field that names it.

    Raises:
        ConfigError: The name is unknown, or a number is missing, superfluous or out of bounds.
    """
    name, colon, rest = text.partition(":")
    given = rest.split(",") if colon else []
    numbers = EXIT_SYNTAX[name][0] if name in EXIT_SYNTAX else ()
    if numbers and len(given) <= len(numbers) and (given or name != "fixed"):
        try:
            values = [each.kind(word) for each, word in zip(numbers, given, strict=False)]
        except ValueError:
            pass
        else:
            for number, value in zip(numbers, values, strict=False):
                check(number, value, where)
            return name, tuple(values)
    raise ConfigError(
        "not an exit rule", where=where, value=text,
        allowed="; ".join(form for _, form in EXIT_SYNTAX.values()),
        fix="write the name, a colon, and its numbers separated by commas",
    )  # fmt: skip


def check(number: Number, value: float, where: str) -> None:
    """Raise a ConfigError unless ``value`` is within the bounds of ``number``."""
    try:
        if number.kind is int:
            check_count(number.name, value)
        else:
            check_number(number.name, value, **number.bounds)
    except ConfigError as error:
        raise ConfigError(
            error.what, where=where, value=value, allowed=error.allowed,
            fix=f"correct {number.name} in {where}",
        ) from error  # fmt: skip


def complete(name: str, given: tuple[float, ...], gate: float | None) -> tuple[float, ...]:
    """Return all numbers of rule ``name``: the given ones, then defaults.

    Args:
        gate: The threshold that a model with a trained gate holds.
    """
    defaults = [gate if name == "gate" else each.default for each in EXIT_SYNTAX[name][0]]
    return (*given, *(each for each in defaults[len(given) :] if each is not None))
