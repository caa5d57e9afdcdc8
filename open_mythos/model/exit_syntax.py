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
    if (
        name in EXIT_SYNTAX
        and len(given) <= len(EXIT_SYNTAX[name][0])
        and (given or name != "fixed")
    ):
        try:
            numbers = zip(EXIT_SYNTAX[name][0], given, strict=False)
            return name, tuple(check(each, each.kind(word), where) for each, word in numbers)
        except ConfigError:
            raise
        except ValueError:
            pass
    raise ConfigError(
        "not an exit rule", where=where, value=text,
        allowed="; ".join(form for _, form in EXIT_SYNTAX.values()),
        fix="write the name, a colon, and its numbers separated by commas",
    )  # fmt: skip


def check(number: Number, value: float, where: str) -> float:
    """Return ``value`` if it is within the bounds of ``number``; raise a ConfigError otherwise."""
    place = f"{number.name} of {where}"
    if number.kind is int:
        return check_count(place, value)
    check_number(place, value, **number.bounds)
    return value


def complete(name: str, given: tuple[float, ...], gate: float | None) -> tuple[float, ...]:
    """Return all numbers of rule ``name``: the given ones, then defaults.

    Args:
        gate: The threshold that a model with a trained gate holds.
    """
    defaults = [gate if name == "gate" else each.default for each in EXIT_SYNTAX[name][0]]
    return (*given, *(each for each in defaults[len(given) :] if each is not None))
