"""Seeds derived from a name and integers.

All randomness of the library is a pure function of (seed, stream name, indices), never of call
order, rank or local batch shape: resuming, changing the world size and batching change no draw.
Deriving a seed loads no torch.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, stream: str, *indices: int) -> int:
    """Hash ``seed``, the stream's name and ``indices`` to a 63-bit seed.

    Args:
        seed: The run's seed.
        stream: Purpose of the random numbers, e.g. ``"depth"`` or ``"data"``.
        indices: Step, global sample index, loop, ...; the order matters.
    """
    text = "/".join([str(int(seed)), stream, *(str(int(i)) for i in indices)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seeded_generator(seed: int, stream: str, *indices: int) -> torch.Generator:
    """Return a CPU ``torch.Generator`` seeded by :func:`derive_seed`."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, stream, *indices))
