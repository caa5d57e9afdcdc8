"""Seeds derived from a name and integers.

All randomness of the library is a pure function of (seed, stream name, indices), never of call
order, rank or local batch shape, so that resuming, changing the world size and batching share one
mechanism.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, stream: str, *indices: int) -> int:
    """A 63-bit seed that depends on ``seed``, the stream's name and ``indices`` alone.

    Args:
        seed: The run's seed.
        stream: What the numbers are for, e.g. ``"depth"`` or ``"data"``.
        indices: Step, global sample index, loop, ... in an order fixed by the caller.
    """
    text = "/".join([str(int(seed)), stream, *(str(int(i)) for i in indices)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seeded_generator(seed: int, stream: str, *indices: int) -> torch.Generator:
    """A CPU ``torch.Generator`` seeded by :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, stream, *indices))
