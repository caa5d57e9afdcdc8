"""Argument checks shared by the data modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from open_mythos.errors import ConfigError, DataError


def check_int(value: Any, where: str, minimum: int) -> int:
    """``value`` if it is an integer (not a bool) of at least ``minimum``.

    Raises:
        ConfigError: It is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ConfigError(
            "not a valid number", where=where, value=value, allowed=f"an integer >= {minimum}"
        )
    return value


def check_ranks(batch: int, where: str, rank: int, world_size: int) -> None:
    """A batch of ``batch`` samples must divide among ``world_size`` ranks, ``rank`` being one.

    Raises:
        ConfigError: It does not.
    """
    check_int(batch, where, 1)
    check_int(world_size, "world_size", 1)
    if check_int(rank, "rank", 0) >= world_size:
        raise ConfigError("no such rank", where="rank", value=rank, allowed=f"0..{world_size - 1}")
    if batch % world_size:
        raise ConfigError(
            f"{batch} samples do not divide among {world_size} ranks",
            where=where,
            value=batch,
            allowed=f"a multiple of the world size, {world_size}",
        )


def check_position(saved: Mapping[str, Any], present: Mapping[str, Any], what: str) -> None:
    """A saved position must be one in the data that is there.

    Args:
        saved: Its fields.
        present: The fields that it must have.
        what: What is wrong if it has others.

    Raises:
        DataError: ``what``; names each field that differs.
    """
    differing = {
        key: (saved.get(key, "missing"), present.get(key, "unknown"))
        for key in sorted(present.keys() | saved.keys())
        if key not in saved or key not in present or saved[key] != present[key]
    }
    if differing:
        raise DataError(
            what,
            where="load_state_dict: " + ", ".join(differing),
            value="; ".join(f"{key}: saved {a!r}, now {b!r}" for key, (a, b) in differing.items()),
            allowed="equal fields",
            fix="resume with the data and settings of the saved run, or start a new run",
        )
