"""Argument checks shared by the data modules."""

from __future__ import annotations

from typing import Any

from open_mythos.errors import ConfigError


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
