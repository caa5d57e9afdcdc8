"""Which sizes get which treatment, and how long what is padded becomes. Nothing here loads torch:
who plans for memory reads the same numbers."""

from __future__ import annotations

DEFERRED_TOKENS = 256
"""Tokens per expert and use up to which it pays to let the gradients of all uses wait."""
WAITING = 4
"""Elements that may wait for a stack, in units of its own."""
BATCHED_TOKENS = 2
"""Tokens per expert from which, on a CPU in bfloat16, a product for several experts pays."""
ROWS = 2048
"""Most padded rows of a batch of several experts."""
PADDING = 1.5
"""Most rows of a batch, over those that its experts would have each in a batch of its own."""
MOST = 64
"""Most experts of a batch; a power of two, as every batch has few sizes."""


def padded(count: int) -> int:
    """``count`` or somewhat more, of few values: products of as many rows have few shapes.

    Multiples of 32, and above 256 of an eighth of themselves or less.
    """
    step = max(32, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step
